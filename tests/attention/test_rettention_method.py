"""Re-ttention's identities: at a refresh the repaired softmax is dense attention, at a reuse it is the formula, and
whose state it is never depends on who shares the call."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tessera.archs import Layout
from tessera.kernels.attention import block_sparse, dual_softmax
from tessera.methods.attention import _static
from tessera.methods.attention import rettention as m
from tessera.methods.attention.call import AttentionCall, Decline

CASES = [  # grid, tokens before the image, after it
    ((1, 17, 23), 0, 0),
    ((1, 15, 16), 7, 3),
    ((1, 31, 5), 0, 40),
    ((5, 9, 11), 3, 0),
    ((3, 7, 13), 0, 20),
]
DENSITY = 0.1


def layout(grid, before=0, after=0):
    n = math.prod(grid)
    return Layout(grid, slice(before, before + n), before + n + after)


def explicit(case, pattern, density):
    """The pattern as a bool mask [N, N] in sequence order, written down from its definition."""
    (frames, h, w), before, after = case
    n, area = frames * h * w, h * w
    t, y, x = (a.flatten() for a in torch.meshgrid(*(torch.arange(s) for s in (frames, h, w)), indexing="ij"))
    flat = torch.arange(n)
    if pattern == "circle":
        discs = [sum(a * a + b * b < r * r for a in range(-r, r) for b in range(-r, r)) for r in range(1, 24)]
        radius = sum(tokens <= round(area * density) for tokens in discs) or 1
        seen = (y[:, None] - y).square() + (x[:, None] - x).square() < radius**2
    elif pattern == "band_per_frame":
        seen = (flat[:, None] % area - flat % area).abs() <= int(area * density) // 2
    elif pattern == "band":
        seen = (flat[:, None] - flat).abs() <= int(n * density) // 2
    else:
        chosen = torch.zeros(frames, dtype=torch.bool)
        count = max(0, round(frames * density) - 1)
        chosen[[i * frames // count for i in range(count)]] = True
        seen = (t[:, None] == t) | chosen[t][:, None] | chosen[t]
    mask = torch.ones(before + n + after, before + n + after, dtype=torch.bool)
    mask[before : before + n, before : before + n] = seen
    return mask


def call_of(case, step=0, keys=("a",), rows=1, kv=2, dtype=torch.float32, mask=None, series=0, restarts=0, seed=0):
    where, g = layout(*case), torch.Generator().manual_seed(seed)
    sizes = 2, kv, kv
    q, k, v = (torch.randn(rows * len(keys), where.total, n, 24, generator=g).to(dtype).transpose(1, 2) for n in sizes)
    clock = SimpleNamespace(step=step, evaluation=step, series=series, restarts=restarts, evaluations_a_step=1)
    forward = SimpleNamespace(run=SimpleNamespace(clock=clock), keys=keys, calls={})
    block = SimpleNamespace(number=0, count=2)
    return AttentionCall(q, k, v, mask, 0.2, "joint", where, block, forward)


def dense(call):
    return sdpa(call.q, call.k, call.v, call.mask, scale=call.scale, enable_gqa=True)


def masked(call, allowed):
    bias = torch.zeros(allowed.shape, dtype=call.q.dtype).masked_fill(~allowed, -math.inf)[None, None]
    bias = bias if call.mask is None else bias + torch.zeros(call.mask.shape).masked_fill(~call.mask, -math.inf)
    return sdpa(call.q, call.k, call.v, bias, scale=call.scale, enable_gqa=True)


def share(call, allowed):
    """rho [B, H, N], from all weights written down."""
    k = call.k.repeat_interleave(call.q.shape[1] // call.k.shape[1], 1)
    scores = (call.q @ k.transpose(2, 3)).float() * call.scale
    if call.mask is not None:
        scores = scores.masked_fill(~call.mask, -math.inf)
    return (scores.softmax(-1) * allowed).sum(-1)


def of(**changes):
    return m.Rettention(**{"density": DENSITY, "pattern": "circle", "ramp": 0.1, **changes})


@pytest.mark.parametrize("block", [(128, 16), (32, 32)], ids=str)
@pytest.mark.parametrize("density", [0.03, 0.4])
@pytest.mark.parametrize("pattern", _static.PATTERNS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_lists_are_the_pattern(case, pattern, density, block):
    plan, mask = _static.build(layout(*case), pattern, density, block), explicit(case, pattern, density)
    if plan.dense:
        assert bool(mask.all()) and pattern == "frame_tile"
        return
    ordered = mask[plan.order][:, plan.order]
    rows, cols = (-(-len(mask) // size) for size in block)
    for i in range(rows):
        got = torch.zeros(cols * block[1], dtype=torch.bool)
        live = slice(0, int(plan.cnt[0, 0, i]))
        for j, mode in zip(plan.idx[0, 0, i, live].tolist(), plan.mode[0, 0, i, live].tolist(), strict=True):
            part = ordered[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            got[j * block[1] : (j + 1) * block[1]] = True
            assert bool(part.any()) and (mode == 1 or bool(part.all())) and not (mode == 1 and bool(part.all()))
        assert not ordered[i * block[0] : (i + 1) * block[0]][:, ~got[: len(mask)]].any()
    assert mask.sum() <= plan.computed <= plan.dense_pairs == len(mask) ** 2 and plan.partly <= plan.computed


@pytest.mark.parametrize("pattern", _static.PATTERNS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_refresh_is_dense_and_a_reuse_is_the_formula(case, pattern, error):
    method, density = of(pattern=pattern, density=0.4), 0.4
    state, first = method.begin(), call_of(case)
    allowed = explicit(case, pattern, density)
    if bool(allowed.all()):
        with pytest.raises(Decline, match="spans the picture"):
            method.attend(state, first)
        return
    answer = method.attend(state, first)
    assert error(answer.out, dense(first)) < 1e-6
    assert answer.pairs > answer.dense_pairs == 2 * len(allowed) ** 2
    rho, image = share(first, allowed), layout(*case).image
    rest = dense(first) - rho[..., None] * masked(first, allowed)
    for n in range(4):
        later = call_of(case, step=1 + n, seed=5 + n)
        got = method.attend(state, later)
        grown = rho.clone()
        grown[..., image] = (rho[..., image] + n * 0.1).clamp_max(1)
        assert error(got.out, grown[..., None] * masked(later, allowed) + rest) < 1e-5
        assert got.pairs <= got.dense_pairs
    assert (state.refreshed, state.reused) == (1, 4)
    fresh = call_of(case, step=5, seed=9)
    assert error(method.attend(state, fresh).out, dense(fresh)) < 1e-6 and state.refreshed == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", _static.PATTERNS[:3])
def test_with_nothing_changed_a_reuse_is_dense_attention(pattern, dtype, error):
    method = of(pattern=pattern, ramp=0.0)
    state = method.begin()
    for step in range(3):
        call = call_of(CASES[1], step=step, dtype=dtype)
        got = method.attend(state, call).out
        assert got.dtype == dtype and error(got, dense(call)) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert state.reused == 2


def test_what_the_other_switches_mean(error):
    allowed = explicit(CASES[1], "circle", DENSITY)
    first, later = call_of(CASES[1]), call_of(CASES[1], step=1, seed=3)
    rho, part = share(first, allowed)[..., None], masked(later, allowed)
    wants = {
        (False, True): rho * part,
        (True, False): part + dense(first) - masked(first, allowed),
        (False, False): part,
    }
    for (residual, reshape), want in wants.items():
        method = of(residual=residual, reshape=reshape)
        state = method.begin()
        method.attend(state, first)
        assert error(method.attend(state, later).out, want) < 1e-5
    method, allowed = of(density=0.4, ramp=0.5, clamp_ratio=False), explicit(CASES[1], "circle", 0.4)
    state = method.begin()
    for step in range(5):
        got = method.attend(state, call_of(CASES[1], step=step))
    rho = share(first, allowed)[..., None]
    grown = rho.clone()
    grown[:, :, layout(*CASES[1]).image] += 3 * 0.5
    assert bool((grown > 1.05).any())
    want = grown * masked(first, allowed) + dense(first) - rho * masked(first, allowed)
    assert error(got.out, want) < 1e-5


def test_the_kernel_path_agrees(error, monkeypatch):
    """On a GPU the permuted tensors go to the kernels; here the interpreter runs them, on a GPU's plan."""
    monkeypatch.setattr(_static, "gathers", lambda _: False)
    monkeypatch.setattr(_static, "block_sparse", block_sparse.launch)
    monkeypatch.setattr(_static, "dual_softmax", dual_softmax.launch)
    case = (2, 5, 7), 0, 4
    plan, call = _static.build(layout(*case), "circle", DENSITY, (128, 64)), call_of(case)
    allowed = explicit(case, "circle", DENSITY)
    full, lse_full, part, lse = _static.refresh(plan, call.q, call.k, call.v, call.scale, None)
    assert error(full, dense(call)) < 1e-6 and error(part, masked(call, allowed)) < 1e-6
    assert error((lse - lse_full).exp(), share(call, allowed)) < 1e-5
    factor, rest = torch.rand(1, 2, plan.layout.total), torch.randn(call.q.shape)
    got = _static.listed(plan, call.q, call.k, call.v, call.scale, None, factor, rest)
    assert error(got, factor[..., None] * masked(call, allowed) + rest) < 1e-6


def test_padding_and_grouped_heads(error):
    n = layout(*CASES[1]).total
    mask = torch.ones(2, 1, 1, n, dtype=torch.bool)
    mask[1, ..., 3:7] = False
    method, allowed = of(ramp=0.0), explicit(CASES[1], "circle", DENSITY)
    state, calls = method.begin(), [call_of(CASES[1], s, ("a", "b"), kv=1, mask=mask, seed=s) for s in (0, 1)]
    first = method.attend(state, calls[0])
    assert error(first.out, dense(calls[0])) < 1e-6
    rho = share(calls[0], allowed)[..., None]
    want = rho * masked(calls[1], allowed) + dense(calls[0]) - rho * masked(calls[0], allowed)
    assert error(method.attend(state, calls[1]).out, want) < 1e-5


def rows(call, at, keys):
    """The same call with only those rows, in that order."""
    forward = SimpleNamespace(run=call.forward.run, keys=keys, calls={})
    q, k, v = (x[at] for x in (call.q, call.k, call.v))
    return AttentionCall(q, k, v, None, call.scale, call.kind, call.layout, call.block, forward)


def test_rows_are_found_by_their_stream(error):
    """Joined, apart and swapped: every stream goes on from its own past."""
    method, a, b = of(), [0, 1], [2, 3]
    first, later = (call_of(CASES[1], s, ("a", "b"), rows=2, seed=s) for s in (0, 1))
    state = method.begin()
    method.attend(state, first)
    want = method.attend(state, later).out
    for refresh, reuse in (("joined", "apart"), ("apart", "joined"), ("joined", "swapped"), ("swapped", "joined")):
        state = method.begin()
        parts = {"joined": [(a + b, ("a", "b"))], "swapped": [(b + a, ("b", "a"))], "apart": [(a, ("a",)), (b, ("b",))]}
        for at, keys in parts[refresh]:
            method.attend(state, rows(first, at, keys))
        got = torch.empty_like(want)
        for at, keys in parts[reuse]:
            got[at] = method.attend(state, rows(later, at, keys)).out
        assert error(got, want) < 1e-6 and state.reused == len(parts[reuse])


@pytest.mark.parametrize("change", [
    {"restarts": 1}, {"series": 1}, {"keys": ("b",)}, {"case": CASES[0]}, {"rows": 2}, {"dtype": torch.bfloat16},
])  # fmt: skip
def test_what_has_no_past_is_refreshed(change, error):
    method, call = of(), call_of(CASES[1])
    state = method.begin()
    method.attend(state, call)
    case = change.pop("case", CASES[1])
    new = call_of(case, step=1, seed=4, **change)
    assert error(method.attend(state, new).out, dense(new)) < (1e-2 if change.get("dtype") else 1e-6)
    assert (state.refreshed, state.reused) == (2, 0)


def test_two_calls_of_one_block_do_not_meet(error):
    method = of()
    state = method.begin()
    for nth in (1, 2):
        call = call_of(CASES[1], seed=nth)
        call.forward.calls[0] = nth
        assert error(method.attend(state, call).out, dense(call)) < 1e-6
    assert state.refreshed == 2


def test_streams_that_moved_away_are_forgotten():
    method = of(interval=50)
    state = method.begin()
    for step in range(12):
        method.attend(state, call_of(CASES[1], step, keys=(step,)))
    assert len(state.kept) == m.UNUSED + 1 and state.peak_bytes == state.bytes
    assert state.bytes == sum(e.bytes for e in state.kept.values()) == 3 * 250 * 2 * (24 * 4 + 4)


@pytest.mark.parametrize(("settings", "size"), [({}, 4), ({"cache_dtype": "bfloat16"}, 2), ({"residual": False}, 0)])
def test_memory_is_told_before_and_after(settings, size):
    method = of(**settings)
    state, call = method.begin(), call_of(CASES[1], keys=("a", "b"))
    method.attend(state, call)
    assert state.bytes == 2 * 250 * 2 * (24 * size + 4) == method.held_bytes(call.q.numel(), 24, torch.float32)
    method.attend(state, call_of(CASES[1], step=1, keys=("a", "b")))
    assert method.facts(state) == {"refreshed": 1, "reused": 1, "peak_bytes": state.bytes}
    assert method.line(method.facts(state)) == f"refreshed 1, reused 1, held {state.bytes / 2**20:.1f} MiB"


def test_chunks_of_one_memory_are_joined_without_a_copy():
    whole = torch.randn(4, 6, 3, 2).transpose(1, 2)
    parts = list(whole.chunk(2))
    same = m._joined(parts)
    assert same.data_ptr() == whole.data_ptr() and torch.equal(same, whole)
    for others in (parts[::-1], [parts[0], parts[1].clone()]):
        assert torch.equal(m._joined(others), torch.cat(others))


def test_what_it_leaves_to_others():
    n = layout(*CASES[1]).total
    cut = AttentionCall(*torch.zeros(3, 3, 2, n, 8), None, 1.0, "joint", layout(*CASES[1]), None, None)
    for method, call, words in (
        (of(interval=1), call_of(CASES[1]), "interval 1 is dense attention"),
        (of(density=1.0), call_of(CASES[1]), "the pattern spans the picture"),
        (of(), call_of(CASES[1], mask=torch.ones(1, 1, n, n).tril().bool()), "differs between queries"),
        (of(), rows(call_of(CASES[1], rows=3), [0, 1, 2], ("a", "b")), "rows cannot be told apart"),
    ):
        with pytest.raises(Decline, match=words):
            method.attend(method.begin(), call)
    assert cut.layout is not None
    for wrong in ({"pattern": "disc"}, {"density": 0.0}, {"density": 1.5}, {"interval": 0}):
        with pytest.raises(ValueError, match="Unknown pattern|Rettention needs"):
            of(**wrong)
