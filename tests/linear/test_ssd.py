import inspect
import math

import pytest
import torch

from tessera.kernels.linear import _ssd_chunks
from tessera.kernels.linear import ssd as m

SERVE = {"kernel": m.launch, "reference": m.reference}
SHAPES = [  # B, H, G, N, S, E
    (1, 1, 1, 1, 16, 16),
    (1, 2, 1, 70, 24, 20),
    (2, 1, 1, 64, 64, 72),
    (1, 1, 1, 33, 112, 96),
    (1, 2, 2, 130, 7, 5),
]
WAYS = [("forward", 1), ("reverse", 1), ("both", 1), ("both", 2)]


def one_scan(x, b, c, a, state):
    """Token after token."""
    b, c = (t.repeat_interleave(x.shape[1] // b.shape[1], 1) for t in (b, c))
    s = x.new_zeros(*x.shape[:2], b.shape[3], x.shape[3]) if state is None else state
    rows = []
    for t in range(x.shape[2]):
        s = s * a[:, :, t].exp()[..., None, None] + b[:, :, t, :, None] * x[:, :, t, None, :]
        rows.append((c[:, :, t, :, None] * s).sum(2))
    return torch.stack(rows, 2), s


def brute(x, b, c, a, state=None, direction="forward", a_reverse=None, diagonal=1):
    back = a if a_reverse is None else a_reverse

    def flipped(state):
        y, s = one_scan(*(t.flip(2) for t in (x, b, c, back)), state)
        return y.flip(2), s

    if direction == "forward":
        return one_scan(x, b, c, a, state)
    if direction == "reverse":
        return flipped(state)
    y, s = one_scan(x, b, c, a, None if state is None else state[0])
    z, r = flipped(None if state is None else state[1])
    b, c = (t.repeat_interleave(x.shape[1] // b.shape[1], 1) for t in (b, c))
    own = 0 if diagonal == 2 else (b * c).sum(-1, keepdim=True) * x
    return y + z - own, torch.stack((s, r))


def make(shape, device, direction="forward", dtype=torch.float32, strength=2.0):
    """x [B, H, N, E] and c token-major, as a model's projections give them, b not; decays between 1 and e^-strength."""
    batch, heads, groups, n, s, e = shape
    x = torch.randn(batch, n, heads, e, device=device).to(dtype).transpose(1, 2)
    b = torch.randn(batch, groups, n, s, device=device).to(dtype)
    c = torch.randn(batch, n, groups, s, device=device).to(dtype).transpose(1, 2)
    a = -strength * torch.rand(batch, heads, n, device=device)
    state = torch.randn(*((2,) if direction == "both" else ()), batch, heads, s, e, device=device)
    return x, b, c, a, state


def double(tensors):
    return [t if t is None else t.double() for t in tensors]


def test_pieces_cover_all_tokens(monkeypatch, device):
    """Long inputs are served piece by piece: the same numbers."""
    inputs = make((1, 2, 1, 300, 8, 4), device, "both")
    grads = torch.randn(1, 2, 300, 4, device=device), torch.randn(2, 1, 2, 8, 4, device=device)
    whole = [*m.reference(*inputs, "both"), *m.backward_reference(*grads, *inputs, "both", None, 2)]
    monkeypatch.setattr(_ssd_chunks, "SLAB", 1)
    pieces = [*m.reference(*inputs, "both"), *m.backward_reference(*grads, *inputs, "both", None, 2)]
    assert len([*_ssd_chunks.slabs(300, 64, 1)]) == 5
    for got, want in zip(pieces, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("serve", SERVE)
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_recurrence(shape, way, serve, device, error):
    direction, diagonal = way
    inputs = make(shape, device, direction)
    other = None if direction == "forward" else -torch.rand_like(inputs[3])
    got = SERVE[serve](*inputs, direction, other, diagonal)
    want = brute(*double(inputs), direction, *double([other]), diagonal)
    assert got[0].dtype == got[1].dtype == torch.float32 and got[0].transpose(1, 2).is_contiguous()
    for mine, right in zip(got, want, strict=True):
        assert mine.shape == right.shape and error(mine, right) < 2e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 1.2e-2)], ids=str)
@pytest.mark.parametrize("serve", SERVE)
def test_low_precision(serve, dtype, bound, device, error):
    inputs = make((1, 1, 1, 130, 72, 40), device, "both", dtype)
    got, want = SERVE[serve](*inputs, "both"), brute(*double(inputs), "both")
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    assert error(got[0], want[0]) < bound and error(got[1], want[1]) < bound


@pytest.mark.parametrize("serve", SERVE)
def test_a_state_beyond_the_range_of_fp16(serve, device, error):
    x, b, c, _, _ = make((1, 1, 1, 70, 16, 16), device, dtype=torch.float16)
    state = 3e5 * torch.randn(1, 1, 16, 16, device=device)
    inputs = x, b, c * 2.0**-8, torch.full((1, 1, 70), -0.01, device=device), state
    got, want = SERVE[serve](*inputs), brute(*double(inputs))
    assert error(got[0], want[0]) < 2e-3 and error(got[1], want[1]) < 2e-3


@pytest.mark.parametrize("serve", SERVE)
def test_columns_that_are_not_adjacent(serve, device, error):
    x, b, c = (torch.randn(1, 2, 12, 40, device=device).transpose(2, 3) for _ in range(3))
    a = -torch.rand(1, 40, 2, device=device).transpose(1, 2)
    got, want = SERVE[serve](x, b, c, a), brute(*double((x, b, c, a)))
    assert error(got[0], want[0]) < 2e-6 and error(got[1], want[1]) < 2e-6


@pytest.mark.parametrize("serve", SERVE)
@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
def test_decays_of_every_strength(direction, serve, device, error):
    """Nothing decays; all is forgotten; and weak decays behind strong ones, which sums of fp32 would lose."""
    x, b, c, a, state = make((1, 3, 1, 70, 16, 16), device, direction)
    a[:, 0], a[:, 1] = 0, -math.inf
    a[:, 2, ::3] = -5e3
    a[:, 2, 1::3] *= 0.01
    got, want = SERVE[serve](x, b, c, a, state, direction), brute(*double((x, b, c, a, state)), direction)
    for head in range(3):
        assert error(got[0][:, head], want[0][:, head]) < 2e-6
        assert error(got[1][..., head, :, :], want[1][..., head, :, :]) < 2e-6
    forgetful = (b * c).sum(-1)[:, 0, :, None] * x[:, 1]
    assert error(got[0][:, 1], forgetful) < 2e-6


@pytest.mark.parametrize("serve", SERVE)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("cut", [1, 64, 77])
def test_a_carried_state_equals_one_pass(cut, direction, serve, device, error):
    x, b, c, a, state = make((1, 1, 1, 90, 16, 16), device, direction)
    parts = [[t[:, :, :cut] for t in (x, b, c, a)], [t[:, :, cut:] for t in (x, b, c, a)]]
    order = (0, 1) if direction == "forward" else (1, 0)
    rows, run = {}, state
    for i in order:
        rows[i], run = SERVE[serve](*parts[i], run, direction)
    want = SERVE[serve](x, b, c, a, state, direction)
    assert error(torch.cat((rows[0], rows[1]), 2), want[0]) < 1e-6 and error(run, want[1]) < 1e-6


@pytest.mark.parametrize("serve", SERVE)
def test_both_directions_are_two_scans_in_one_pass(serve, device, error):
    x, b, c, a, state = make((1, 1, 1, 70, 16, 16), device, "both")
    run, flip = SERVE[serve], [t.flip(2) for t in (x, b, c, a)]
    one, other = run(x, b, c, a, state[0]), run(*flip, state[1])
    twice, last = run(x, b, c, a, state, "both", None, 2)
    assert error(twice, one[0] + other[0].flip(2)) < 1e-6
    assert error(last, torch.stack((one[1], other[1]))) < 1e-6
    assert error(run(x, b, c, a, state[1], "reverse")[0].flip(2), other[0]) < 1e-6
    b, c = torch.ones_like(b), torch.full_like(c, 1 / 16)
    alike = run(torch.ones_like(x), b, c, torch.zeros_like(a), None, "both")[0]
    assert error(alike, torch.full_like(x, 70)) < 1e-6  # every token counts once for every other and itself


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("started", [True, False], ids=["state", "no state"])
def test_gradients(started, way, device):
    direction, diagonal = way
    inputs = double(make((2, 4, 2, 67, 5, 3), device, direction))
    inputs[3][:, :, 5] = -50
    inputs[3][:, 0] = 0
    other = None if direction == "forward" or not started else -torch.rand_like(inputs[3])
    tensors = [*inputs[:4], inputs[4] if started else None, other]
    leaves = [t if t is None else t.clone().requires_grad_() for t in tensors]
    asked = [t for t in leaves if t is not None]
    want = brute(*leaves[:5], direction, leaves[5], diagonal)
    pull = [torch.randn_like(t) for t in want]
    got = torch.autograd.grad(m.ssd(*leaves[:5], direction, leaves[5], diagonal), asked, pull, allow_unused=True)
    right = torch.autograd.grad(want, asked, pull, allow_unused=True)
    for mine, wanted in zip(got, right, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if wanted is None else wanted, rtol=1e-9, atol=1e-9)


def test_gradients_in_low_precision(device, error):
    inputs = make((1, 2, 1, 130, 16, 16), device, "both", torch.bfloat16)
    got = [t.clone().requires_grad_() for t in inputs]
    want = [t.double().requires_grad_() for t in inputs]
    pull = torch.randn(1, 2, 130, 16, device=device)
    m.ssd(*got, "both")[0].backward(pull.bfloat16())
    brute(*want, "both")[0].backward(pull.bfloat16().double())
    for mine, right in zip(got, want, strict=True):
        assert mine.grad.dtype == mine.dtype and error(mine.grad, right.grad) < 1.5e-2


def test_double_stays_double(device):
    inputs = double(make((1, 2, 1, 66, 16, 16), device))
    for got, want in zip(m.launch(*inputs), brute(*inputs), strict=True):
        assert got.dtype == torch.float64 and (got - want).abs().max() < 1e-12


@pytest.mark.parametrize("direction", ["forward", "both"])
def test_custom_op(direction, device):
    x, b, c, a, state = (t.requires_grad_() for t in make((1, 2, 1, 66, 16, 8), device, direction))
    torch.library.opcheck(m.ssd, (x, b, c, a, state, direction))
    torch.library.opcheck(m.ssd, (x, b, c, a, None, direction, None if direction == "forward" else a.detach()))


def test_mismatches_are_named(device):
    x, b, c, a, state = make((1, 4, 2, 8, 16, 8), device)
    cases = [
        ((x, b[:, :, :7], c, a), r"\[1, 2, 7, 16\]"),
        ((x[:, :3], b, c, a[:, :3]), "multiple of G"),
        ((x, b, c, a[:, :3]), r"\[1, 3, 8\]"),
        ((x, b.half(), c, a), "float16"),
        ((x, b, c, a, state[..., :3]), r"\[1, 4, 16, 3\]"),
        ((x, b, c, a, state, "both"), r"\[2, 1, 4, 16, 8\]"),
        ((x, b, c, a, None, "sideways"), "sideways"),
        ((x, b, c, a, None, "forward", a), "a_reverse"),
        ((x, b, c, a, None, "both", None, 3), "diagonal 3"),
        ((x[:, :, :0], b[:, :, :0], c[:, :, :0], a[:, :, :0]), "nothing empty"),
    ]
    for inputs, sentence in cases:
        for serve in SERVE.values():
            with pytest.raises(ValueError, match=sentence):
                serve(*inputs)


def test_example_and_specs(device, error):
    inputs = m.example(70, device, torch.float32)
    got = m.ssd(*inputs)[0]
    assert got.shape == inputs[0].shape == (1, 32, 70, 64) and error(got, brute(*double(inputs[:5]), "both")[0]) < 2e-6
    for spec in m.aot_specs():
        assert {*spec["args"], *spec["const"]} == set(inspect.signature(getattr(m, spec["kernel"]).fn).parameters)
