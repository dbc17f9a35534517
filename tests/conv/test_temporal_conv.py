import pytest
import torch
from torch.nn import functional

from tessera.kernels.conv import temporal_conv as m

ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # the interpreter truncates to bf16
SERVES = [m.launch, m.reference]
NAMES = ["kernel", "reference"]
CASES = [(1, 1, 1, 3, 5, 3), (2, 5, 7, 40, 70, 3), (1, 4, 30, 33, 64, 5)]  # B, T, S, C, C out, K


def make(case, device, dtype=torch.float32, cached=True):
    b, t, s, c, out, k = case
    x, cache = (torch.randn(b, n * s, c + 1, device=device).to(dtype)[..., 1:] for n in (t, k // 2))
    weight, bias = (torch.randn(shape, device=device).to(dtype) for shape in ((out, c, k), (out,)))
    return x, weight, bias, t, cache if cached else None


def exact(x, weight, bias, frames, cache=None):
    """torch's convolution over [B S, C, T] in fp64."""
    radius, step = weight.shape[2] // 2, x.shape[1] // frames
    rows = x.double() if cache is None else torch.cat((cache.double(), x.double()), 1)
    lines = rows.unflatten(1, (-1, step)).permute(0, 2, 3, 1).flatten(0, 1)
    y = functional.conv1d(lines, weight.double(), None if bias is None else bias.double(), padding=radius)
    return y[..., -frames:].unflatten(0, (-1, step)).permute(0, 3, 1, 2).flatten(1, 2)


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "first"])
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_a_convolution_over_time(case, dtype, cached, serve, device, error):
    given = make(case, device, dtype, cached)
    got, want = serve(*given), exact(*given)
    assert got.dtype == dtype and got.shape == want.shape and error(got, want) < ERROR[dtype]


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_chunks_equal_the_whole_but_for_their_last_frame(serve, device):
    x, weight, _, frames, _ = make(CASES[1], device, cached=False)
    whole, first = serve(x, weight, None, frames), serve(x[:, :21], weight, None, 3)
    second = serve(x[:, 21:], weight, None, 2, m.next_cache(x[:, :21], 3, 3))
    assert torch.allclose(torch.cat((first[:, :14], second), 1), whole[:, [*range(14), *range(21, 35)]], atol=1e-5)
    assert not torch.allclose(first[:, 14:], whole[:, 14:21], atol=1e-2)


def test_cache_of_a_chunk_shorter_than_the_window(device):
    x, old = torch.randn(1, 4, 2, device=device), torch.randn(1, 8, 2, device=device)
    assert torch.equal(m.next_cache(x, 1, 5, old), torch.cat((old[:, 4:], x), 1))
    assert torch.equal(m.next_cache(x, 1, 5), torch.cat((torch.zeros_like(x), x), 1))


@pytest.mark.parametrize("serve", ["kernel", "reference"])
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "first"])
def test_gradients(cached, serve, device, error):
    x, weight, bias, frames, cache = make(CASES[1], device, cached=cached)
    g = torch.randn(2, 35, 70, device=device)
    names = [x, weight, bias] + ([cache] if cached else [])
    doubled = [t.detach().double().requires_grad_() for t in names]
    wants = torch.autograd.grad((exact(*doubled[:3], frames, *doubled[3:]) * g).sum(), doubled)
    backward = m.launch_backward if serve == "kernel" else m.temporal_conv_backward
    rows = [t.detach().clone().requires_grad_() for t in names]
    ours = torch.autograd.grad((m.temporal_conv(*rows[:3], frames, *rows[3:]) * g).sum(), rows)
    for a, b, want in zip(backward(g, x, weight, frames, cache), ours, wants, strict=False):
        assert error(a, want) < 5e-6 and error(b, want) < 5e-6


def test_double_stays_double(device, error):
    given = [x.double() if isinstance(x, torch.Tensor) else x for x in make(CASES[1], device)]
    assert error(m.launch(*given), exact(*given)) < 1e-13


def test_custom_op(device):
    x, *rest = make((1, 2, 3, 4, 5, 3), device)
    torch.library.opcheck(m.temporal_conv, (x.requires_grad_(), *rest))


def test_mismatches_are_named(device):
    x, weight, bias, frames, cache = make(CASES[1], device)
    cases = [((x, weight, bias, 4, cache), "4 frames"), ((x, weight[:, :5], bias, frames), r"\[70, 5, 3\]")]
    cases += [((x, weight[..., :2], bias, frames), "odd K"), ((x, weight, bias[:3], frames), r"\[3\]")]
    cases += [((x, weight, bias, frames, cache[:, :3]), r"\[2, 3, 40\]"), ((x.half(), weight, bias, frames), "float16")]
    for given, words in cases:
        for serve in SERVES:
            with pytest.raises(ValueError, match=words):
                serve(*given)


def test_example(device):
    x, weight, bias, frames = m.example(2, device, torch.bfloat16)
    assert frames == 1 and m.launch(x[..., :64], weight[:64, :64], bias, frames).isfinite().all()
