import inspect

import pytest
import torch

from tessera.kernels.cache import forecast as m

SHAPES = [(1,), (3, 65, 40), (2, 1000, 3)]  # one element; blocks and a tail; strided below
WEIGHTS = [[1.0], [2.5, -1.5], [2.08, -1.56, 0.48], [3.4, -4.1, 2.2, -0.5], [5.0, -10.0, 10.0, -5.0, 1.0]]
ULP = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # of a number in [1, 2)


def make(shape, count, device, dtype=torch.float32):
    """Slowly changing features whose last two axes are swapped views, as a model's [B, H, N, D] outputs are."""
    base = torch.randn(*shape[:-2], *shape[:-3:-1], device=device)
    drift = torch.randn(count, *base.shape, device=device)
    return [(base + 0.1 * d).to(dtype).transpose(-1, -2) if len(shape) > 1 else (base + d).to(dtype) for d in drift]


def exact(features, weights):
    return sum(w * f.double() for f, w in zip(features, weights, strict=True))


@pytest.mark.parametrize("weights", WEIGHTS, ids=len)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_matches_reference(shape, weights, device, error):
    features = make(shape, len(weights), device)
    got, want = m.launch(features, weights, torch.float32), m.reference(features, weights, torch.float32)
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
    assert error(got, want) < 1e-6
    assert error(want, exact(features, weights)) < 1e-6


@pytest.mark.parametrize("serve", [m.launch, m.reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtype", ULP, ids=str)
def test_low_precision_is_within_one_ulp_of_the_exact_sum(dtype, serve, device):
    # Rounding gives half an ulp; the interpreter truncates bf16 stores, which costs it up to a whole one.
    features = make((3, 65, 40), 3, device, dtype)
    got, want = serve(features, WEIGHTS[2], dtype), exact(features, WEIGHTS[2])
    ulp = torch.exp2(want.abs().clamp_min(2.0**-14).log2().floor()) * ULP[dtype]
    assert got.dtype == dtype
    assert ((got.double() - want).abs() <= ulp * 1.001 + 1e-6).all()


@pytest.mark.parametrize("stored, result", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_storage_dtype_and_result_dtype_are_free(stored, result, device, error):
    features = make((2, 5, 8), 2, device, stored)
    got, want = m.launch(features, WEIGHTS[1], result), m.reference(features, WEIGHTS[1], result)
    assert got.dtype == want.dtype == result
    assert error(got, want) < 1e-6 and error(want, exact(features, WEIGHTS[1])) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("serve", [m.launch, m.reference], ids=["kernel", "reference"])
def test_one_feature_is_copied_bit_for_bit(dtype, serve, device):
    (feature,) = make((3, 65, 40), 1, device, dtype)
    got = serve([feature], [1.0], dtype)
    assert torch.equal(got, feature) and got.data_ptr() != feature.data_ptr()


@pytest.mark.parametrize("serve", [m.launch, m.reference], ids=["kernel", "reference"])
def test_a_constant_feature_survives_large_weights(serve, device):
    (feature,) = make((2, 64, 8), 1, device)
    assert torch.equal(serve([feature, feature.clone(), feature.clone()], [4e5, -7e5, 3e5 + 1], torch.float32), feature)


def test_weights_need_not_sum_to_one(device, error):
    features = make((4, 33, 8), 3, device)
    weights = [0.7, -2.0, 0.4]  # a multistep sampler's combination
    assert error(m.launch(features, weights, torch.float32), exact(features, weights)) < 1e-6


def test_double_stays_double(device):
    features = [f.double() for f in make((3, 7, 5), 3, device)]
    got = m.launch(features, WEIGHTS[2], torch.float64)
    assert got.dtype == torch.float64 and (got - exact(features, WEIGHTS[2])).abs().max() < 1e-13


@pytest.mark.parametrize("count", [6, 7, 8, 9, 15, 16, 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_features_by_the_kernel(count, dtype, device, error, monkeypatch):
    """Up to 8 in one launch, then 7 more with each; the sum between launches is fp32, whatever the result is."""
    features = make((2, 600, 3), count, device, dtype)
    weights = [(-1.0) ** i * (1 + i / 8) for i in range(count)]
    monkeypatch.setattr(m, "reference", None)
    got = m.launch(features, weights, dtype)
    assert got.dtype == dtype and error(got, exact(features, weights)) < (1e-6 if dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize("count", [1, 2, 8, 9, 15, 16])
def test_every_feature_is_taken_once(count):
    taken = [i for part in m._parts(count) for i in range(count)[part]]
    assert taken == [*range(1, count)] and len(m._parts(count)) == max(1, -(-(count - 1) // (m.MOST - 1)))


def test_a_constant_feature_survives_two_launches(device):
    (feature,) = make((2, 64, 8), 1, device, torch.bfloat16)
    weights = [4e5, -7e5, 3e5 + 1, *[0.0] * 6]
    assert torch.equal(m.launch([feature.clone() for _ in weights], weights, torch.bfloat16), feature)


def test_reference_chunks_cover_a_long_tensor(error):
    features = [torch.randn(3 * m.CPU_CHUNK + 17) for _ in range(2)]
    assert error(m.reference(features, WEIGHTS[1], torch.float32), exact(features, WEIGHTS[1])) < 1e-6


def test_empty_tensor(device):
    features = [torch.zeros(0, 4, device=device)] * 2
    assert m.launch(features, WEIGHTS[1], torch.float32).shape == (0, 4)


def test_custom_op(device):
    torch.library.opcheck(m.forecast, (make((3, 5, 8), 3, device, torch.bfloat16), WEIGHTS[2], torch.float32))


def test_mismatches_are_named(device):
    a = torch.zeros(2, 3, device=device)
    cases = [([a, a], [1.0], "2 features, 1 weights"), ([], [], "0 features"), ([a.long()], [1.0], "floating point")]
    cases += [([a, a[:1]], [2.0, -1.0], r"\[1, 3\]"), ([a, a.half()], [2.0, -1.0], "float16")]
    for features, weights, sentence in cases:
        for serve in (m.reference, m.launch):
            with pytest.raises(ValueError, match=sentence):
                serve(features, weights, torch.float32)


def test_example_and_specs(device, error):
    features, weights, dtype = m.example(4, device, torch.bfloat16)
    got = m.launch(features, weights, dtype)
    assert got.shape == features[0].shape == (1, 4, 3072) and got.dtype == torch.bfloat16
    assert error(got, exact(features, weights)) < 1e-2
    for spec in m.aot_specs():
        kernel = getattr(m, spec["kernel"])
        assert {*spec["args"], *spec["const"]} == set(inspect.signature(kernel.fn).parameters)
