import inspect

import pytest
import torch

from tessera.kernels.cache import gated_error as m
from tessera.kernels.cache.forecast import forecast

SERVES = pytest.mark.parametrize("serve", [m.launch, m.reference], ids=["kernel", "reference"])
WEIGHTS = [[1.0], [2.5, -1.5], [2.08, -1.56, 0.48], [3.4, -4.1, 2.2, -0.5], [5.0, -10.0, 10.0, -5.0, 1.0]]


def make(shape, count, device, dtype=torch.float32):
    """Slowly changing features and what was computed after them."""
    base = torch.randn(shape, device=device)
    return [(base + 0.1 * torch.randn(shape, device=device)).to(dtype) for _ in range(count + 1)]


def exact(features, weights, b):
    y = sum(w * f.double() for f, w in zip(features, weights, strict=True))
    return torch.stack(((y - b.double()).flatten(1).abs().sum(1), b.double().flatten(1).abs().sum(1)), 1)


@SERVES
@pytest.mark.parametrize("weights", WEIGHTS, ids=len)
@pytest.mark.parametrize("shape", [(1, 1), (3, 65, 40), (2, 17001)], ids=str)
def test_equals_the_sums_in_double(shape, weights, serve, device):
    *features, b = make(shape, len(weights), device)
    got = serve(features, weights, b)
    assert got.shape == (shape[0], 2) and got.dtype == torch.float32
    assert torch.allclose(got.double(), exact(features, weights, b), rtol=3e-6, atol=1e-6)


@SERVES
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16], ids=str)
def test_storage_and_model_dtypes_are_free(stored, computed, serve, device):
    """The sums are of the exact forecast: nothing is rounded to the storage precision on the way."""
    *features, _ = make((2, 500, 3), 3, device, stored)
    b = torch.randn(2, 500, 3, device=device).to(computed)
    got = serve(features, WEIGHTS[2], b)
    assert torch.allclose(got.double(), exact(features, WEIGHTS[2], b), rtol=3e-6)


@SERVES
def test_is_the_error_of_the_forecast_kernel(serve, device):
    *features, b = make((2, 30, 40), 2, device)
    y = forecast(features, WEIGHTS[1], torch.float32)
    assert torch.allclose(serve(features, WEIGHTS[1], b)[:, 0], (y - b).abs().sum((1, 2)), rtol=3e-6)
    assert serve(features, WEIGHTS[1], y)[:, 0].max() < 1e-2 * serve(features, WEIGHTS[1], b)[:, 0].min()


def test_many_parts_and_strides_give_the_same_bits_each_time(device, monkeypatch):
    monkeypatch.setattr(m, "BLOCK", 16)
    monkeypatch.setattr(m, "STEPS", 2)  # 38 programs a sample, three loads of their sums
    *features, b = (x.transpose(1, 2) for x in make((2, 30, 40), 2, device))
    got, want = m.launch(features, WEIGHTS[1], b), exact(features, WEIGHTS[1], b)
    assert torch.allclose(got.double(), want, rtol=3e-6) and torch.equal(got, m.launch(features, WEIGHTS[1], b))
    assert torch.allclose(m.reference(features, WEIGHTS[1], b).double(), want, rtol=3e-6)


@SERVES
def test_samples_keep_to_themselves(serve, device):
    """A sample's sums do not depend on its neighbours or its place."""
    *features, b = make((3, 700), 2, device)
    got = serve(features, WEIGHTS[1], b)
    turned = [2, 0, 1]
    assert torch.equal(serve([f[turned] for f in features], WEIGHTS[1], b[turned]), got[turned])
    b[1] = float("nan")
    changed = serve(features, WEIGHTS[1], b)
    assert changed[1].isnan().all() and torch.equal(changed[[0, 2]], got[[0, 2]])


def test_reference_chunks_cover_a_long_sample():
    *features, b = make((2, m.CPU_CHUNK + 5), 2, "cpu")
    assert torch.allclose(m.reference(features, WEIGHTS[1], b).double(), exact(features, WEIGHTS[1], b), rtol=3e-6)


@SERVES
def test_an_unchanged_feature_has_no_error(serve, device):
    (feature, _) = make((2, 64, 8), 1, device)
    got = serve([feature, feature.clone()], [4e5, 1 - 4e5], feature)
    assert (got[:, 0] == 0).all() and (got[:, 1] > 0).all()


@SERVES
def test_double_stays_double(serve, device):
    *features, b = (x.double() for x in make((2, 50), 2, device))
    got = serve(features, WEIGHTS[1], b)
    assert got.dtype == torch.float64 and torch.allclose(got, exact(features, WEIGHTS[1], b), rtol=1e-13)


@SERVES
def test_more_features_than_one_launch_reads(serve, device):
    *features, b = make((2, 90), 9, device)
    weights = [1.0 + i / 8 for i in range(9)]
    assert torch.allclose(serve(features, weights, b).double(), exact(features, weights, b), rtol=3e-6)


def test_custom_op(device):
    *features, b = make((3, 5, 8), 3, device, torch.bfloat16)
    torch.library.opcheck(m.gated_error, (features, WEIGHTS[2], b))


@SERVES
def test_mismatches_are_named(serve, device):
    a = torch.zeros(2, 3, device=device)
    cases = [([a, a], [1.0], a, "2 features, 1 weights"), ([a], [1.0], a[:1], r"\[1, 3\]")]
    cases += [([a], [1.0], a.long(), "floating point"), ([a[:0]], [1.0], a[:0], "not empty")]
    for features, weights, b, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            serve(features, weights, b)


def test_example_and_specs(device):
    features, weights, b = m.example(3, device, torch.bfloat16)
    assert torch.allclose(m.launch(features, weights, b).double(), exact(features, weights, b), rtol=3e-6)
    for spec in m.aot_specs():
        parameters = inspect.signature(getattr(m, spec["kernel"]).fn).parameters
        assert {*spec["args"], *spec["const"]} == set(parameters)
