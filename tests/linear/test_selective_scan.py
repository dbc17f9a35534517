import inspect

import pytest
import torch

from tessera.kernels.linear import _selective_passes
from tessera.kernels.linear import selective_scan as m

SERVE = {"kernel": m.launch, "reference": m.reference}
SHAPES = [(1, 1, 4, 1, 1), (1, 37, 5, 1, 16), (2, 65, 6, 2, 7), (1, 70, 140, 1, 1), (1, 130, 24, 1, 3)]  # B N D G S


def brute(u, delta, a, b, c, skip=None, state=None, reverse=False):
    """Token after token."""
    b, c = (x.repeat_interleave(u.shape[2] // b.shape[1], 1) for x in (b, c))
    h = u.new_zeros(u.shape[0], *a.shape) if state is None else state
    rows, tokens = {}, range(u.shape[1])
    for t in reversed(tokens) if reverse else tokens:
        h = (delta[:, t, :, None] * a).exp() * h + (delta[:, t] * u[:, t])[..., None] * b[:, :, t]
        rows[t] = (h * c[:, :, t]).sum(-1) + (0 if skip is None else skip * u[:, t])
    return torch.stack([rows[t] for t in tokens], 1), h


def make(shape, device, dtype=torch.float32):
    batch, n, channels, groups, states = shape
    u = torch.randn(batch, n, channels, device=device).to(dtype)
    delta = torch.rand(batch, n, channels + 3, device=device)[..., 3:]  # a slice of one projection
    a = -2 * torch.rand(channels, states, device=device)
    b = torch.randn(batch, groups, n, states, device=device).to(dtype)
    c = torch.randn(batch, n, groups, states, device=device).to(dtype).transpose(1, 2)
    return u, delta, a, b, c, torch.randn(channels, device=device), torch.randn(batch, channels, states, device=device)


def double(tensors):
    return [t if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("serve", SERVE)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_recurrence(shape, reverse, serve, device, error):
    inputs = make(shape, device)
    inputs = (*inputs[:5], None, None) if shape[3] == 2 else inputs
    got, want = SERVE[serve](*inputs, reverse), brute(*double(inputs), reverse)
    assert got[0].dtype == got[1].dtype == torch.float32
    for mine, right in zip(got, want, strict=True):
        assert mine.shape == right.shape and error(mine, right) < 2e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)], ids=str)
@pytest.mark.parametrize("serve", SERVE)
def test_low_precision(serve, dtype, bound, device, error):
    inputs = make((1, 90, 12, 1, 4), device, dtype)
    got, want = SERVE[serve](*inputs), brute(*double(inputs))
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    assert error(got[0], want[0]) < bound and error(got[1], want[1]) < 2e-6


@pytest.mark.parametrize("serve", SERVE)
def test_channels_first(serve, device, error):
    """[B, D, N] and [B, S, N] memory, as Mamba's own layers have it, without a copy of u."""
    u, delta, a, b, c, skip, state = make((2, 70, 9, 1, 4), device)
    u, delta, b, c = (x.mT.contiguous().mT for x in (u, delta, b, c))
    got, want = SERVE[serve](u, delta, a, b, c, skip, state), brute(*double((u, delta, a, b, c, skip, state)))
    assert got[0].stride() == u.stride() and error(got[0], want[0]) < 2e-6 and error(got[1], want[1]) < 2e-6


@pytest.mark.parametrize("serve", SERVE)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_decays_of_every_strength(reverse, serve, device, error):
    u, delta, a, b, c, skip, state = make((1, 90, 8, 1, 4), device)
    a[:2], a[2:4] = 0, -300
    delta[:, ::3, 4:6], delta[:, 1::3, 4:6] = 9e3, 1e-3
    delta[:, :, 6:] = 0
    inputs = u, delta, a, b, c, skip, state
    got, want = SERVE[serve](*inputs, reverse), brute(*double(inputs), reverse)
    for part in range(0, 8, 2):
        assert error(got[0][..., part : part + 2], want[0][..., part : part + 2]) < 2e-6
        assert error(got[1][:, part : part + 2], want[1][:, part : part + 2]) < 2e-6
    assert torch.equal(got[1][:, 6:], state[:, 6:])


@pytest.mark.parametrize("serve", SERVE)
def test_limits(serve, device, error):
    """delta 0: only the skip is left, to the bit. A = 0 and delta 1: the running sum of B u, seen by C."""
    u, delta, a, b, c, skip, _ = make((1, 100, 6, 1, 3), device)
    assert torch.equal(SERVE[serve](u, torch.zeros_like(delta), a, b, c, skip)[0], u * skip)
    got = SERVE[serve](u, torch.ones_like(delta), torch.zeros_like(a), b, c)[0]
    total = (u[..., None] * b[:, 0, :, None]).double().cumsum(1)
    assert error(got, (total * c[:, 0, :, None]).sum(-1)) < 2e-6


@pytest.mark.parametrize("serve", SERVE)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cut", [1, 64, 77])
def test_a_carried_state_equals_one_pass(cut, reverse, serve, device, error):
    u, delta, a, b, c, skip, state = make((1, 90, 8, 1, 4), device)
    want = SERVE[serve](u, delta, a, b, c, skip, state, reverse)
    rows, run = {}, state
    for i in (1, 0) if reverse else (0, 1):
        at = slice(0, cut) if i == 0 else slice(cut, None)
        rows[i], run = SERVE[serve](u[:, at], delta[:, at], a, b[:, :, at], c[:, :, at], skip, run, reverse)
    assert error(torch.cat((rows[0], rows[1]), 1), want[0]) < 1e-6 and error(run, want[1]) < 1e-6


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("optional", [True, False], ids=["all", "least"])
def test_gradients(optional, reverse, device, monkeypatch):
    monkeypatch.setattr(_selective_passes, "HELD", 1000)  # several runs of chunks
    inputs = double(make((2, 67, 6, 2, 3), device))
    inputs[1][:, 9] = 1e3
    inputs[2][0] = 0
    leaves = [t.clone().requires_grad_() for t in inputs]
    leaves[5:] = leaves[5:] if optional else [None, None]
    asked = [t for t in leaves if t is not None]
    want = brute(*leaves, reverse)
    pull = [torch.randn_like(t) for t in want]
    got = torch.autograd.grad(m.selective_scan(*leaves, reverse), asked, pull)
    for mine, right in zip(got, torch.autograd.grad(want, asked, pull), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9)


def test_gradients_in_low_precision(device, error):
    inputs = make((1, 130, 8, 1, 4), device, torch.bfloat16)
    got, want = [t.clone().requires_grad_() for t in inputs], [t.double().requires_grad_() for t in inputs]
    pull = torch.randn(1, 130, 8, device=device).bfloat16()
    m.selective_scan(*got)[0].backward(pull)
    brute(*want)[0].backward(pull.double())
    for mine, right in zip(got, want, strict=True):
        assert mine.grad.dtype == mine.dtype and error(mine.grad, right.grad) < 1e-2


def test_double_stays_double(device):
    inputs = double(make((1, 66, 8, 1, 4), device))
    for got, want in zip(m.launch(*inputs), brute(*inputs), strict=True):
        assert got.dtype == torch.float64 and (got - want).abs().max() < 1e-12


def test_custom_op(device):
    u, delta, a, b, c, skip, state = (t.requires_grad_() for t in make((1, 20, 4, 2, 3), device))
    torch.library.opcheck(m.selective_scan, (u, delta, a, b, c, skip, state, True))
    b, c = (x.detach().mT.contiguous().mT.requires_grad_() for x in (b, c))
    torch.library.opcheck(m.selective_scan, (u, delta, a, b, c))


def test_mismatches_are_named(device):
    u, delta, a, b, c, skip, state = make((1, 8, 6, 2, 4), device)
    cases = [
        ((u, delta[:, :7], a, b, c), r"\[1, 7, 6\]"),
        ((u, delta, a[:5], b, c), r"\[5, 4\]"),
        ((u, delta, a, b, c[..., :3]), r"\[1, 2, 8, 3\]"),
        ((u[..., :5], delta[..., :5], a[:5], b, c), "5 channels .* 2 groups"),
        ((u, delta, a, b.half(), c), "float16"),
        ((u, delta, a, b, c, skip[:3]), r"skip \[3\]"),
        ((u, delta, a, b, c, skip, state[..., :3]), r"\[1, 6, 3\]"),
        ((u[:, :0], delta[:, :0], a, b[:, :, :0], c[:, :, :0]), "nothing empty"),
    ]
    for inputs, sentence in cases:
        for serve in SERVE.values():
            with pytest.raises(ValueError, match=sentence):
                serve(*inputs)


def test_example_and_specs(device, error):
    inputs = m.example(70, device, torch.float32)
    got = m.selective_scan(*inputs)[0]
    assert got.shape == inputs[0].shape == (1, 70, 640) and error(got, brute(*double(inputs))[0]) < 2e-6
    for spec in m.aot_specs():
        assert {*spec["args"], *spec["const"]} == set(inspect.signature(getattr(m, spec["kernel"]).fn).parameters)
