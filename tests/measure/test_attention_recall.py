"""The mass that patterns keep, against masks written down from their definitions over full attention matrices."""

import math
from types import SimpleNamespace

import pytest
import torch

from tessera.archs import Layout
from tessera.kernels.attention.reorder import compact_order
from tessera.methods.attention.call import AttentionCall, Decline
from tessera.methods.attention.log_linear_sparse import LogLinearSparse
from tessera.methods.measure import attention_recall as m
from tessera.methods.measure.patterns import PATTERNS, Settings, curve

CASES = [((1, 7, 11), 0, 0), ((3, 5, 7), 9, 0), ((4, 6, 6), 0, 13)]  # grid, tokens before the image, after it
EVERY = 10**6  # more queries than there are


def layout(grid, before=0, after=0):
    n = math.prod(grid)
    return Layout(grid, slice(before, before + n), before + n + after)


def call_of(where, heads=4, kv=2, mask=None, batch=1, step=0, streams=1, sharp=2.0):
    q = sharp * torch.randn(batch, where.total, heads, 16).transpose(1, 2)
    k, v = (torch.randn(batch, where.total, kv, 16).transpose(1, 2) for _ in range(2))
    clock = SimpleNamespace(step=step)
    forward = SimpleNamespace(run=SimpleNamespace(clock=clock), keys=tuple(range(streams)))
    return AttentionCall(q, k, v, mask, 0.25, "self", where, SimpleNamespace(number=3, count=9), forward)


def shares(call):
    """Full attention matrices of the first row, fp64 [H, N, N]."""
    k = call.k.repeat_interleave(call.q.shape[1] // call.k.shape[1], 1)
    logits = call.scale * call.q.double() @ k.double().transpose(2, 3)
    if call.mask is not None:
        logits = logits.masked_fill(~call.mask, -math.inf)
    return logits[0].softmax(-1)


def allowed(settings, where, value, call):
    """bool [H, n, n]: the image pairs that a pattern keeps with this value of its setting."""
    grid, n = where.grid, math.prod(where.grid)
    t, y, x = torch.meshgrid(*(torch.arange(s) for s in grid), indexing="ij")
    t, y, x = (a.flatten() for a in (t, y, x))
    heads = call.q.shape[1]
    if settings.pattern == "window":
        frames = grid[0] if settings.frames < 0 else settings.frames
        near = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < value**2
        return (near & ((t[:, None] - t).abs() <= frames)).expand(heads, n, n)
    if settings.pattern == "tile":
        chosen = torch.zeros(grid[0], dtype=torch.bool)
        for i in range(int(value)):
            chosen[math.floor(i * (grid[0] - 1) / max(1, value - 1) + 0.5)] = True
        return ((t[:, None] == t) | chosen[t] | chosen[t][:, None]).expand(heads, n, n)
    if settings.pattern == "tokens":
        image = shares(call)[:, where.image, where.image]
        best = image.topk(max(1, math.ceil(value * n)), -1).indices
        return torch.zeros(heads, n, n, dtype=torch.bool).scatter_(2, best, True)
    sizes = [settings.block**i for i in range(1, 12) if i == 1 or settings.block**i < n]
    if settings.pattern == "diagonal":
        sizes = [int(value)]
    order = compact_order(grid, tuple(sizes))
    place = torch.empty(n, dtype=torch.int64)
    place[order] = torch.arange(n)
    if settings.pattern == "diagonal":
        return (place[:, None] // int(value) == place // int(value)).expand(heads, n, n)
    patch, out = place // settings.block, torch.zeros(heads, n, n, dtype=torch.bool)
    patches = int(patch.max()) + 1
    for h in range(heads):
        q, k = call.q[0, h, where.image], call.k[0, h * call.k.shape[1] // heads, where.image]
        means = [torch.stack([part[patch == i].mean(0) for i in range(patches)]) for part in (q, k)]
        best = (means[0] @ means[1].T).topk(max(1, math.ceil(value * patches)), -1).indices
        kept = torch.zeros(patches, patches, dtype=torch.bool).scatter_(1, best, True)
        out[h] = kept[patch][:, patch]
    return out


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_brute_force(case, pattern, monkeypatch):
    where, settings = layout(*case), Settings(pattern, 0.3, 8 if pattern == "blocks" else 16, 1)
    call, found = call_of(where), curve(settings, where, EVERY, 0)
    got, full = m.recall(found, call, 0), shares(call)
    image = full[:, where.image]
    text = 1 - image[..., where.image].sum(-1).mean()
    for i in range(0, len(found.values), max(1, len(found.values) // 9)):
        keep = allowed(settings, where, found.values[i], call)
        want = (image[..., where.image] * keep).sum(-1).mean() + text
        assert float(got[i]) == pytest.approx(float(want), abs=2e-6)
        if pattern not in ("tokens", "blocks"):
            assert found.densities[i] == pytest.approx(keep[0].double().mean().item(), abs=1e-9)
    monkeypatch.setattr(m, "SCORES", 1)
    assert torch.allclose(m.recall(found, call, 0), got, atol=1e-7), "head by head and query by query"


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_grows_with_density_up_to_one(case, pattern):
    where = layout(*case)
    found = curve(Settings(pattern), where, 64, 3)
    got = m.recall(found, call_of(where), 0)
    assert found.densities == sorted(found.densities) and found.densities[-1] == pytest.approx(1)
    assert float(got[-1]) == pytest.approx(1, abs=1e-6) and 0 < float(got[0]) <= 1
    if pattern not in ("tile", "diagonal"):  # whose frames and cuts are others for each setting
        assert bool((got[1:] >= got[:-1] - 1e-12).all())


def test_no_pattern_keeps_more_than_the_best_tokens():
    where = layout((4, 8, 8), 5)
    call = call_of(where)
    best = curve(Settings("tokens"), where, EVERY, 0)
    bound = m.recall(best, call, 0)
    for pattern in ("blocks", "window", "diagonal", "tile"):
        other = curve(Settings(pattern), where, EVERY, 0)
        got = m.recall(other, call, 0)
        kept = [count / 16 for count in other.amounts] if pattern == "blocks" else other.densities
        for density, value in zip(kept, got, strict=True):
            assert float(value) <= float(bound[best.at(density)]) + 1e-6


def test_blocks_are_those_of_log_linear_attention():
    """The patches that the probe counts are the ones that the attention node picks, with one level."""
    where = layout((1, 24, 24))
    call, density = call_of(where, heads=2, kv=1, sharp=1.0), 0.2
    settings = Settings("blocks", density)
    found = curve(settings, where, EVERY, 0)
    keep = allowed(settings, where, density, call)
    method = LogLinearSparse(density=density, enrich=False)
    v = torch.eye(576)[None, None]  # the output is the matrix of shares
    q, k = call.q, call.k
    spread = torch.nn.functional.pad
    got = method.compute(method.plan(where), spread(q, (0, 560)), spread(k, (0, 560)), v, 0.25)
    assert torch.equal(got[0] > 0, keep)
    assert method.plan(where).topk == math.ceil(density * 36)
    assert (found.values[found.at(density)], found.amounts[found.at(density)]) == (0.2, 8)


def test_masks_by_key_and_by_query():
    where = layout((1, 7, 11), 6)
    n, found = where.total, curve(Settings("window"), where, EVERY, 0)
    for mask in (torch.rand(1, 1, 1, n) < 0.7, (torch.rand(1, 4, n, n) < 0.7) | torch.eye(n, dtype=torch.bool)):
        call = call_of(where, mask=mask)
        full = shares(call)[:, where.image]
        keep = allowed(Settings("window"), where, 3, call)
        want = 1 - (full[..., where.image] * ~keep).sum(-1).mean()
        assert float(m.recall(found, call, 0)[2]) == pytest.approx(float(want), abs=2e-6)


def test_queries_are_drawn_by_the_seed():
    where = layout((1, 20, 20))
    a, b, c = (curve(Settings(), where, 32, seed).queries for seed in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, c) and len(a.unique()) == 32 and bool((a.diff() > 0).all())


def test_a_sample_is_near_the_whole():
    where = layout((1, 24, 24))
    call = call_of(where)
    some, every = (m.recall(curve(Settings("tokens"), where, n, 1), call, 0) for n in (96, EVERY))
    assert float((some - every).abs().max()) < 0.03


def test_the_method_only_looks():
    where = layout((1, 7, 11), 6)
    found = m.Found(frozenset({2}))
    method = m.AttentionRecall(Settings(), found, 16)
    state = method.begin()
    assert state is found
    for step in (1, 2):
        with pytest.raises(Decline, match="measured only"):
            method.attend(state, call_of(where, batch=4, step=step, streams=2))
    ((place, (total, rows)),) = found.sums.items()
    assert place == (3, 2) and rows == 2
    assert torch.equal(found.curves()[3, 2], total / 2)
    with pytest.raises(Decline):
        method.attend(state, call_of(layout((1, 9, 9)), step=2))
    unknown = call_of(where, step=2)
    with pytest.raises(Decline):
        method.attend(state, AttentionCall(**{**vars(unknown), "layout": None}))
    assert found.missed == {"another size than the first": 1, "token layout unknown": 1}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pattern": "stripes"}, "blocks, window, tokens"),
        ({"density": 0.0}, "density above 0"),
        ({"block": 0}, "block of at least 1"),
        ({"frames": -2}, "frames of at least -1"),
    ],
)
def test_what_cannot_be_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Settings(**settings)
