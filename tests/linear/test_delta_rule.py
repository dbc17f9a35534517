import inspect
import math

import pytest
import torch

from tessera.kernels.linear import _ssd_chunks
from tessera.kernels.linear import delta_rule as m

SERVE = {"kernel": m.launch, "reference": m.reference}
SHAPES = [
    (1, 1, 1, 16, 16),
    (2, 1, 70, 24, 20),
    (1, 2, 65, 96, 72),
    (1, 1, 33, 128, 128),
    (1, 2, 64, 5, 7),
]  # B H N D E


def brute(q, k, v, beta, g=None, state=None, scale=None):
    """Token after token."""
    s = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]) if state is None else state
    rows = []
    for t in range(q.shape[2]):
        if g is not None:
            s = s * g[:, :, t].exp()[..., None, None]
        recalled = (k[:, :, t, :, None] * s).sum(2)
        s = s + k[:, :, t, :, None] * (beta[:, :, t, None] * (v[:, :, t] - recalled))[:, :, None]
        rows.append((q[:, :, t, :, None] * s).sum(2))
    return torch.stack(rows, 2) * (q.shape[3] ** -0.5 if scale is None else scale), s


def make(shape, device, dtype=torch.float32, alike=1.0):
    """Keys of length 1 that resemble each other the more, the larger `alike`; q and v token-major."""
    batch, heads, n, d, e = shape
    q = torch.randn(batch, n, heads, d, device=device)
    k = torch.randn(batch, heads, n, d, device=device).transpose(1, 2)
    k = torch.nn.functional.normalize(k + alike, dim=-1)
    v = torch.randn(batch, n, heads, e, device=device)
    beta, g = 1.5 * torch.rand(batch, heads, n, device=device), -0.5 * torch.rand(batch, heads, n, device=device)
    state = torch.randn(batch, heads, d, e, device=device)
    return *(x.to(dtype).transpose(1, 2) for x in (q, k, v)), beta, g, state


def double(tensors):
    return [t if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("serve", SERVE)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_recurrence(shape, gated, serve, device, error):
    q, k, v, beta, g, state = make(shape, device)
    inputs = (q, k, v, beta, g, state) if gated else (q, k, v, beta)
    got, want = SERVE[serve](*inputs), brute(*double(inputs))
    assert got[0].dtype == got[1].dtype == torch.float32 and got[0].transpose(1, 2).is_contiguous()
    for mine, right in zip(got, want, strict=True):
        assert mine.shape == right.shape and error(mine, right) < 3e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)], ids=str)
@pytest.mark.parametrize("serve", SERVE)
def test_low_precision(serve, dtype, bound, device, error):
    inputs = make((1, 1, 130, 72, 40), device, dtype, alike=0.5)
    got, want = SERVE[serve](*inputs), brute(*double(inputs))
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    assert error(got[0], want[0]) < bound and error(got[1], want[1]) < bound


@pytest.mark.parametrize("serve", SERVE)
def test_keys_that_are_all_the_same(serve, device, error):
    """The powers of A then hold binomials up to 10^18, while its inverse holds only 1 and -1."""
    q, _, v, beta, *_ = make((1, 1, 70, 16, 16), device)
    k = torch.full_like(q, 0.25)
    inputs = q, k, v, torch.ones_like(beta)
    got, want = SERVE[serve](*inputs), brute(*double(inputs))
    assert error(got[0], want[0]) < 2e-6 and error(got[1], want[1]) < 2e-6
    last = q[:, :, -1:] @ k[:, :, -1:].mT * 0.25 @ v[:, :, -1:]  # only what was written last is left
    assert error(got[0][:, :, -1:], last) < 1e-5


@pytest.mark.parametrize("size", [32, 64])
def test_the_inverse_of_a_chunk(size, device, error):
    """Blocks of 16 tokens that take much from each other, and keys that are all the same."""
    a = torch.stack((torch.randn(size, size, device=device) / 4, torch.ones(size, size, device=device))).tril(-1)
    t = torch.empty_like(a)
    m.delta_inverse[(2,)](a, t, L=size)
    want = torch.linalg.inv(torch.eye(size, device=device).double() + a.double())
    assert error(t[0], want[0]) < 1e-6 and error(t[1], want[1]) < 1e-6


@pytest.mark.parametrize("serve", SERVE)
def test_recalls_what_was_written_last(serve, device, error):
    """Orthonormal keys, beta 1: a stored key gives its value, a key written again only its new one."""
    keys = torch.linalg.qr(torch.randn(32, 32, device=device)).Q[None, None]
    old, new = torch.randn(2, 1, 1, 32, 16, device=device)
    k, v = torch.cat((keys, keys[:, :, :8]), 2), torch.cat((old, new[:, :, :8]), 2)
    once, state = SERVE[serve](k, k, v, torch.ones_like(v[..., 0]), None, None, 1.0)
    assert error(once, v) < 2e-6  # and so it is the plain sum of k v^T while keys are new
    assert error(keys @ state, torch.cat((new[:, :, :8], old[:, :, 8:]), 2)) < 2e-6


@pytest.mark.parametrize("serve", SERVE)
def test_states_do_not_grow_and_nothing_is_written_for_beta_0(serve, device, error):
    q, k, v, beta, _, state = make((1, 1, 70, 16, 16), device)
    same = SERVE[serve](q, k, v, torch.zeros_like(beta), None, state)
    assert torch.equal(same[1], state) and error(same[0], q @ state * 0.25) < 2e-6
    last = SERVE[serve](q, k, torch.zeros_like(v), 4 / 3 * beta, None, state)[1]  # beta in 0 .. 2
    assert (torch.linalg.matrix_norm(last) <= torch.linalg.matrix_norm(state) * (1 + 1e-6)).all()


@pytest.mark.parametrize("serve", SERVE)
def test_gates_of_every_strength(serve, device, error):
    """No gate, all is forgotten, and weak gates behind strong ones, which sums of fp32 would lose."""
    q, k, v, beta, g, state = make((1, 3, 70, 16, 16), device)
    g[:, 0], g[:, 1] = 0, -math.inf
    g[:, 2, ::3] = -5e3
    g[:, 2, 1::3] *= 0.01
    got, want = SERVE[serve](q, k, v, beta, g, state), brute(*double((q, k, v, beta, g, state)))
    for head in range(3):
        assert error(got[0][:, head], want[0][:, head]) < 3e-6
        assert error(got[1][:, head], want[1][:, head]) < 3e-6
    plain = SERVE[serve](q, k, v, beta, None, state)
    assert error(got[0][:, 0], plain[0][:, 0]) < 1e-6


@pytest.mark.parametrize("serve", SERVE)
@pytest.mark.parametrize("cut", [1, 64, 77])
def test_a_carried_state_equals_one_pass(cut, serve, device, error):
    *rows, state = make((1, 1, 90, 16, 16), device)
    first, run = SERVE[serve](*(t[:, :, :cut] for t in rows), state)
    second, run = SERVE[serve](*(t[:, :, cut:] for t in rows), run)
    want = SERVE[serve](*rows, state)
    assert error(torch.cat((first, second), 2), want[0]) < 1e-6 and error(run, want[1]) < 1e-6


@pytest.mark.parametrize("serve", SERVE)
def test_columns_that_are_not_adjacent(serve, device, error):
    q, k, v = (0.3 * torch.randn(1, 2, 12, 40, device=device).transpose(2, 3) for _ in range(3))
    beta = torch.rand(1, 40, 2, device=device).transpose(1, 2)
    got, want = SERVE[serve](q, k, v, beta), brute(*double((q, k, v, beta)))
    assert error(got[0], want[0]) < 2e-6 and error(got[1], want[1]) < 2e-6


def test_pieces_cover_all_tokens(monkeypatch, device):
    """Long inputs are served piece by piece: the same numbers."""
    inputs = make((1, 2, 300, 8, 4), device)
    grads = torch.randn(1, 2, 300, 4, device=device), torch.randn(1, 2, 8, 4, device=device)
    whole = [*m.reference(*inputs), *m.backward_reference(*grads, *inputs, None)]
    monkeypatch.setattr(_ssd_chunks, "SLAB", 1)
    pieces = [*m.reference(*inputs), *m.backward_reference(*grads, *inputs, None)]
    for got, want in zip(pieces, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optional", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_gradients(optional, device):
    gated, started = optional
    inputs = double(make((2, 2, 131, 6, 5), device))
    inputs[4][:, :, 7] = -40
    inputs[4][:, 0] = 0
    leaves = [t.clone().requires_grad_() for t in inputs]
    leaves[4], leaves[5] = leaves[4] if gated else None, leaves[5] if started else None
    asked = [t for t in leaves if t is not None]
    want = brute(*leaves, 0.7)
    pull = [torch.randn_like(t) for t in want]
    got = torch.autograd.grad(m.delta_rule(*leaves, 0.7), asked, pull)
    for mine, right in zip(got, torch.autograd.grad(want, asked, pull), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9)


def test_gradients_in_low_precision(device, error):
    inputs = make((1, 2, 130, 16, 16), device, torch.bfloat16)
    got, want = [t.clone().requires_grad_() for t in inputs], [t.double().requires_grad_() for t in inputs]
    pull = torch.randn(1, 2, 130, 16, device=device).bfloat16()
    m.delta_rule(*got)[0].backward(pull)
    brute(*want)[0].backward(pull.double())
    for mine, right in zip(got, want, strict=True):
        assert mine.grad.dtype == mine.dtype and error(mine.grad, right.grad) < 1.5e-2


def test_double_stays_double(device):
    inputs = double(make((1, 2, 66, 16, 16), device))
    for got, want in zip(m.launch(*inputs), brute(*inputs), strict=True):
        assert got.dtype == torch.float64 and (got - want).abs().max() < 1e-12


def test_heads_wider_than_the_kernel(device, error):
    inputs = make((1, 1, 20, 144, 16), device)
    for got, want in zip(m.launch(*inputs), brute(*double(inputs)), strict=True):
        assert error(got, want) < 3e-6


def test_custom_op(device):
    q, k, v, beta, g, state = (t.requires_grad_() for t in make((1, 2, 66, 16, 8), device))
    torch.library.opcheck(m.delta_rule, (q, k, v, beta, g, state, 0.5))
    torch.library.opcheck(m.delta_rule, (q, k, v, beta))


def test_mismatches_are_named(device):
    q, k, v, beta, g, state = make((1, 2, 8, 16, 8), device)
    cases = [
        ((q[:, :1], k, v, beta), r"\[1, 1, 8, 16\]"),
        ((q, k, v[:, :, :7], beta), r"\[1, 2, 7, 8\]"),
        ((q, k, v, beta[:, :, :7]), r"beta \[1, 2, 7\]"),
        ((q, k, v, beta, g[:, :1]), r"gate \[1, 1, 8\]"),
        ((q, k.half(), v, beta), "float16"),
        ((q, k, v, beta, g, state.mT), r"\[1, 2, 8, 16\]"),
        ((q[:, :, :0], k[:, :, :0], v[:, :, :0], beta[:, :, :0]), "nothing empty"),
    ]
    for inputs, sentence in cases:
        for serve in SERVE.values():
            with pytest.raises(ValueError, match=sentence):
                serve(*inputs)


def test_example_and_specs(device, error):
    inputs = m.example(70, device, torch.float32)
    got = m.delta_rule(*inputs)[0]
    assert got.shape == inputs[0].shape == (1, 8, 70, 128) and error(got, brute(*double(inputs))[0]) < 2e-6
    for spec in m.aot_specs():
        assert {*spec["args"], *spec["const"]} == set(inspect.signature(getattr(m, spec["kernel"]).fn).parameters)
