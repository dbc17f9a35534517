import pytest
import torch

from tessera.kernels.norm import pose_modulate as m

ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # the interpreter truncates to bf16
SERVES = [m.launch, m.reference]
NAMES = ["kernel", "reference"]
CASES = [(2, None, 1, 5), (1, 3, 19, 36), (2, 2, 7, 130), (1, 1, 4, 1)]  # rows of c, of base, tokens, channels


def make(case, device, dtype=torch.float32):
    """Slices of wider rows; the modulations are thirds of one projection."""
    b, rows, n, c = case
    wide = torch.randn(b, n, c + 3, device=device).to(dtype)[..., 3:] * 2 + 0.5
    weight, bias = (torch.randn(c, device=device).to(dtype) for _ in range(2))
    shift, scale, gate = torch.randn(b, 3 * c, device=device).to(dtype).chunk(3, 1)
    base = None if rows is None else torch.randn(rows, n, 2, c, device=device).to(dtype)[:, :, 0]
    return wide, weight, bias, shift, scale, gate, 1e-5, base, 0.7


def exact(c, weight, bias, shift, scale, gate, eps=1e-5, base=None, strength=1.0):
    """fp64, mean and variance by hand."""
    c, shift, scale, gate = c.double(), *(t.double()[:, None] for t in (shift, scale, gate))
    y = (c - c.mean(-1, keepdim=True)) / (c.var(-1, correction=0, keepdim=True) + eps).sqrt()
    y = y * (1 if weight is None else weight.double()) + (0 if bias is None else bias.double())
    y = y * (1 + scale) + shift
    return y if base is None else base.double() + strength * y, (1 + gate) * y


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pose_modulate(case, dtype, serve, device, error):
    given = make(case, device, dtype)
    for got, want in zip(serve(*given), exact(*given), strict=True):
        assert got.dtype == dtype and got.shape == want.shape and got.is_contiguous()
        assert error(got, want) < ERROR[dtype]


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("left", [(True, False), (False, True), (False, False)], ids=str)
def test_a_norm_without_weight_or_bias(left, serve, device, error):
    c, *affine, shift, scale, gate = make(CASES[2], device)[:6]
    given = (c, *(t if keep else None for t, keep in zip(affine, left, strict=True)), shift, scale, gate)
    for got, want in zip(serve(*given), exact(*given), strict=True):
        assert error(got, want) < 2e-6


def test_pieces_of_a_sequence_are_the_whole(device, monkeypatch):
    given = make(CASES[1], device)
    whole = m.reference(*given)
    monkeypatch.setattr(m, "CACHED", 3 * 36 * 4)  # four tokens at once, and three at the end
    assert all(torch.equal(*both) for both in zip(whole, m.reference(*given), strict=True))


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_a_strength_of_zero_leaves_the_base(serve, device):
    *given, base, _ = make(CASES[1], device)
    assert torch.equal(serve(*given, base, 0.0)[0], base)


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_a_chain_of_42_blocks(dtype, most, serve, device, error):
    """c is handed on; one chain of batch 1 is that of a batch of two equal rows."""
    c = torch.randn(1, 3, 24, device=device).to(dtype)
    blocks = [[(torch.randn(size, device=device) * 0.3 + add).to(dtype) for size, add in SIZES] for _ in range(42)]
    want, both = c.double(), c.expand(2, -1, -1)
    for weight, bias, *modulation in blocks:
        _, c = serve(c, weight, bias, *modulation)
        _, both = serve(both, weight, bias, *modulation)
        _, want = exact(want, weight, bias, *modulation)
    assert torch.equal(both, c.expand(2, -1, -1)) and error(c, want) < most


SIZES = [((24,), 1.0), ((24,), 0.0)] + [((1, 24), 0.0)] * 3


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_gradients(case, device, error):
    given = make(case, device)
    held = [i for i, t in enumerate(given) if isinstance(t, torch.Tensor)]
    weights = [torch.randn_like(t) for t in m.reference(*given)]
    found = []
    for fn, kind in ((m.pose_modulate, torch.float32), (exact, torch.float64)):
        mine = [t.detach().to(kind).requires_grad_() if i in held else t for i, t in enumerate(given)]
        loss = sum((y * w).sum() for y, w in zip(fn(*mine), weights, strict=True))
        found.append(torch.autograd.grad(loss, [mine[i] for i in held]))
    for got, want in zip(*found, strict=True):
        assert got.shape == want.shape and error(got, want) < 1e-5


def test_double_stays_double(device, error):
    given = [t.double() if isinstance(t, torch.Tensor) else t for t in make(CASES[1], device)]
    assert error(m.launch(*given)[0], exact(*given)[0]) < 1e-13


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_custom_op(case, device):
    c, *rest = make(case, device)
    torch.library.opcheck(m.pose_modulate, (c.requires_grad_(), *rest))


def test_mismatches_are_named(device):
    c, weight, bias, shift, scale, gate, eps, base, _ = make(CASES[2], device)
    cases = [((c[0], weight, bias, shift, scale, gate), r"\[7, 130\]")]
    cases += [((c, weight[:4], bias, shift, scale, gate), r"weight \[4\]")]
    cases += [((c, weight, bias, shift[:, :9], scale, gate), r"shift \[2, 9\]")]
    cases += [((c, weight, bias, shift, scale, gate.half()), "gate .* torch.float16 must")]
    cases += [((c, weight, bias, shift, scale, gate, eps, base[:, :3]), "number of frames")]
    for given, words in cases:
        for serve in SERVES:
            with pytest.raises(ValueError, match=words):
                serve(*given)


def test_example(device):
    got = m.launch(*m.example(2, device, torch.bfloat16))
    assert got[0].shape == (2, 2, 3072) and got[1].shape == (1, 2, 3072) and all(t.isfinite().all() for t in got)
