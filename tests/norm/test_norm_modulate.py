import pytest
import torch
from torch.nn import functional

from tessera.kernels.norm import gated_norm_modulate as g
from tessera.kernels.norm import norm_modulate as m

ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # the interpreter truncates to bf16
NAMES = ["kernel", "reference"]
FORMS = ["vector", "token", "mixed", "one"]
B, N, C = 2, 19, 36


def modulation(form, device, dtype=torch.float32):
    """gate, scale, shift."""
    shapes = {"vector": [(B, C)] * 3, "token": [(B, N, C)] * 3, "mixed": [(B, C), (B, N, C), (B, C)]}
    shapes["one"] = [(1, N, C), (1, C), (1, C)]
    return [torch.randn(s, device=device).to(dtype) for s in shapes[form]]


def rows(device, dtype=torch.float32, c=C):
    """x, a slice of something wider, and h, which is not."""
    wide, h = (torch.randn(s, device=device).to(dtype) + 0.5 for s in ((B, N, 2, c), (B, N, c)))
    return wide[:, :, 0], h


def wide(t):
    return t if t.ndim == 3 else t[:, None]


def exact(x, scale, shift, kind, eps=1e-6):
    x = x.double()
    norm = functional.layer_norm(x, x.shape[-1:], eps=eps)
    if kind == "rms":
        norm = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return norm * (1 + wide(scale.double())) + wide(shift.double())


@pytest.mark.parametrize("serve", [m.launch, m.reference], ids=NAMES)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("form, kind", [("vector", "layer"), ("token", "rms"), ("mixed", "layer"), ("one", "rms")])
def test_norm_modulate(form, kind, dtype, serve, device, error):
    (x, _), (_, scale, shift) = rows(device, dtype), modulation(form, device, dtype)
    got = serve(x, scale, shift, kind)
    assert got.dtype == dtype and got.is_contiguous() and error(got, exact(x, scale, shift, kind)) < ERROR[dtype]


@pytest.mark.parametrize("serve", [g.launch, g.reference], ids=NAMES)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("form, kind", [("vector", "rms"), ("token", "layer"), ("mixed", "rms"), ("one", "layer")])
def test_gated(form, kind, dtype, serve, device, error):
    (x, h), (gate, scale, shift) = rows(device, dtype), modulation(form, device, dtype)
    total, y = serve(x, h, gate, scale, shift, kind)
    assert error(total, x.double() + wide(gate.double()) * h.double()) < ERROR[dtype]
    assert error(y, exact(total, scale, shift, kind)) < ERROR[dtype]  # of the sum that was stored


@pytest.mark.parametrize("serve", ["kernel", "reference"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients(form, kind, serve, device, error):
    (x, h), mods = rows(device), modulation(form, device)
    weights = torch.randn(2, B, N, C, device=device)
    doubled = [t.detach().double().requires_grad_() for t in (x, h, *mods)]
    total = doubled[0] + wide(doubled[2]) * doubled[1]
    loss = (total * weights[0] + exact(total, *doubled[3:], kind) * weights[1]).sum()
    wants = torch.autograd.grad(loss, doubled)
    single = [t.detach().clone().requires_grad_() for t in (x, h, *mods)]
    made = g.gated_norm_modulate(*single, kind)
    ours = torch.autograd.grad(sum((a * w).sum() for a, w in zip(made, weights, strict=True)), single)
    back = g.launch_backward_op if serve == "kernel" else g.gated_norm_modulate_backward
    got = back(weights[0], weights[1], made[0].detach(), h, *mods, kind, 1e-6)
    for a, b, want, t in zip(got, ours, wants, single, strict=True):
        assert a.shape == t.shape and error(a, want) < 1e-5 and error(b, want) < 1e-5
    plain = [doubled[0], *doubled[3:]]
    wants = torch.autograd.grad((exact(*plain, kind) * weights[1]).sum(), plain)
    back = m.launch_backward_op if serve == "kernel" else m.norm_modulate_backward
    for a, want in zip(back(weights[1], x, *mods[1:], kind, 1e-6), wants, strict=True):
        assert a.shape == want.shape and error(a, want) < 1e-5


@pytest.mark.parametrize("c", [1, 1152, 3000])
def test_widths(c, device, error):
    x, scale = torch.randn(1, 3, c, device=device), torch.randn(1, c, device=device)
    assert error(m.launch(x, scale, scale, "rms"), exact(x, scale, scale, "rms")) < 2e-6


def test_rows_of_equal_channels_stay_finite(device):
    x, zero = torch.full((1, 2, 40), 3.0, device=device), torch.zeros(1, 40, device=device)
    assert (m.launch(x, zero, zero).abs() < 1e-2).all()
    assert (m.launch(x * 0, zero, zero, "rms") == 0).all()


def test_double_stays_double(device, error):
    (x, h), mods = rows(device, torch.float64), modulation("vector", device, torch.float64)
    assert error(m.launch(x, *mods[1:]), exact(x, *mods[1:], "layer")) < 1e-13
    assert g.launch(x, h, *mods)[1].dtype == torch.float64


def test_custom_ops(device):
    (x, h), mods = rows(device), modulation("mixed", device)
    torch.library.opcheck(m.norm_modulate, (x.detach().requires_grad_(), *mods[1:]))
    torch.library.opcheck(g.gated_norm_modulate, (x.detach().requires_grad_(), h, *mods))


@pytest.mark.parametrize("on", ["launch", "reference"])
def test_mismatches_are_named(on, device):
    (x, h), (gate, scale, shift) = rows(device), modulation("vector", device)
    cases = [((x[0], scale, shift), r"\[19, 36\]"), ((x, scale[:, :3], shift), r"\[2, 3\]")]
    cases += [((x, scale, shift.half()), "float16"), ((x, scale, shift, "batch"), "batch")]
    for given, words in cases:
        with pytest.raises(ValueError, match=words):
            getattr(m, on)(*given)
    with pytest.raises(ValueError, match=r"\[2, 5, 36\]"):
        getattr(g, on)(x, h[:, :5], gate, scale, shift)


def test_examples(device):
    assert m.launch(*m.example(2, device, torch.bfloat16)).isfinite().all()
    assert all(t.isfinite().all() for t in g.launch(*g.example(2, device, torch.bfloat16)))
