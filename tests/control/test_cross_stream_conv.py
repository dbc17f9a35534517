import pytest
import torch
from torch.nn import functional

from tessera.kernels.control import cross_stream_conv as m

ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # the interpreter truncates to bf16
SERVES = [m.launch, m.reference]
NAMES = ["kernel", "reference"]
CASES = [  # B, H, W, C, K, scale, approximate
    (1, 1, 1, 2, 3, 1.2, "tanh"),
    (2, 5, 9, 70, 3, 1.2, "tanh"),  # not square, two tiles of channels and a tail
    (1, 7, 5, 66, 5, -0.5, "none"),
    (2, 1, 23, 12, 3, 1.0, "tanh"),
]


def make(case, device, dtype=torch.float32, biased=True):
    """a and r are the halves of one sequence, as in the model, of rows that are a slice."""
    b, h, w, c, k = case[:5]
    both = torch.randn(b, 2 * h * w, c + 3, device=device).to(dtype)[..., 3:]
    weight, bias = (torch.randn(s, device=device).to(dtype) for s in ((c, 1, k, k), (c,)))
    return both[:, : h * w], both[:, h * w :], weight, bias if biased else None, [h, w], *case[5:]


def exact(a, r, weight, bias, grid, scale=1.2, approximate="tanh"):
    """fp64, by torch's convolution of a channels-first picture."""
    g, c = functional.gelu(r.double(), approximate=approximate), a.shape[2]
    image = g.transpose(1, 2).reshape(-1, c, *grid)
    bias = None if bias is None else bias.double()
    mixed = functional.conv2d(image, weight.double(), bias, padding=weight.shape[-1] // 2, groups=c)
    return functional.gelu(a.double(), approximate=approximate) + scale * mixed.flatten(2).transpose(1, 2), g


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_a_convolution_of_pictures(case, dtype, serve, device, error):
    given = make(case, device, dtype)
    for got, want in zip(serve(*given), exact(*given), strict=True):
        assert got.dtype == dtype and got.shape == want.shape and got.is_contiguous()
        assert error(got, want) < ERROR[dtype]


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_without_bias(serve, device, error):
    given = make(CASES[2], device, biased=False)
    assert error(serve(*given)[0], exact(*given)[0]) < 2e-6


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_streams_that_do_not_mix(serve, device, error):
    """A scale of zero, as a weight and bias of zero, leaves two GELUs; r goes its way alone in any case."""
    a, r, weight, bias, grid, *_ = make(CASES[1], device)
    out, g = serve(a, r, weight, bias, grid, 0.0)
    assert torch.equal(out, serve(a, r, weight * 0, bias * 0, grid)[0])
    assert (
        torch.equal(g, serve(a * 2, r, weight, bias, grid)[1])
        and error(out, functional.gelu(a, approximate="tanh")) < 1e-6
    )


@pytest.mark.parametrize("case", [CASES[1], CASES[2]], ids=str)
def test_gradients(case, device, error):
    given = make(case, device)
    leaves = [t.detach().clone().requires_grad_() for t in given[:4]]
    doubled = [t.detach().double().requires_grad_() for t in given[:4]]
    weights = [torch.randn_like(given[0]) for _ in range(2)]
    got, want = (
        torch.autograd.grad(sum((y * w).sum() for y, w in zip(fn(*on, *given[4:]), weights, strict=True)), on)
        for fn, on in ((m.cross_stream_conv, leaves), (exact, doubled))
    )
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape and error(ours, theirs) < 5e-6


def test_double_stays_double(device, error):
    given = [t.double() if isinstance(t, torch.Tensor) else t for t in make(CASES[1], device)]
    assert error(m.launch(*given)[0], exact(*given)[0]) < 1e-13


def test_custom_op(device):
    a, *rest = make((1, 2, 3, 4, 3, 1.2, "tanh"), device)
    torch.library.opcheck(m.cross_stream_conv, (a.requires_grad_(), *rest))


def test_mismatches_are_named(device):
    a, r, weight, bias, grid, *_ = make(CASES[2], device)
    cases = [((a, r, weight, bias, [7, 6]), r"\[7, 6\]"), ((a, r[:, :9], weight, bias, grid), "need one size")]
    cases += [((a, r, weight[:, 0], bias, grid), r"\[66, 5, 5\]"), ((a, r, weight[..., :4, :4], bias, grid), "odd K")]
    cases += [((a, r, weight, bias[:2], grid), r"\[2\]"), ((a, r, weight, bias, grid, 1.0, "fast"), "fast")]
    cases += [((a.half(), r, weight, bias, grid), "float16 and torch.float32")]
    for given, words in cases:
        for serve in SERVES:
            with pytest.raises(ValueError, match=words):
                serve(*given)


@pytest.mark.parametrize("tokens", [1, 6])
def test_example(tokens, device):
    for got in m.launch(*m.example(tokens, device, torch.bfloat16)):
        assert got.shape == (1, tokens, 6144) and got.isfinite().all()
