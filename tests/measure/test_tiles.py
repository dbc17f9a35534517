"""The losses of Attention Tile Search against explicit masks, and its choices against all that could be chosen."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from segments_helper import call_of, layout, masked, seen, whole

from tessera.methods.attention.call import AttentionCall, Decline
from tessera.methods.attention.tile import frames_of, kept_tiles
from tessera.methods.measure import tiles as m

CANDIDATES = (1, 2, 3, 5)


def explicit(call, k, how, metric):
    """Loss from the whole output of dense attention and of the explicit mask, in the image rows."""
    mask = seen(whole(call.layout, frames_of(call.layout.grid, k, how)))
    full, cut = (masked(call, x)[:, :, call.layout.image] for x in (torch.ones_like(mask), mask))
    if metric == "rel_mse":
        return ((cut - full).square().sum() / full.square().sum()).item()
    return 1 - torch.nn.functional.cosine_similarity(full, cut, dim=-1).mean().item()


@pytest.mark.parametrize("metric", m.METRICS)
@pytest.mark.parametrize("how", ["even", "last"])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (6, 0), (0, 4)])
def test_losses_are_those_of_the_masks(before, after, how, metric):
    where = layout((6, 4, 5), before, after)
    mask = torch.ones(2, 1, 1, where.total, dtype=torch.bool)
    mask[1, ..., 7:9] = False
    call = call_of(where, mask, heads=(4, 2))
    got = m.losses(call, CANDIDATES, how, metric)
    assert got == pytest.approx([explicit(call, k, how, metric) for k in CANDIDATES], rel=1e-4, abs=1e-6)
    assert got[0] > got[2] > got[3] == pytest.approx(0, abs=1e-6), "5 of 6 frames leave nothing out"


def test_heads_in_parts_and_sampled_queries(monkeypatch):
    call = call_of(layout((8, 8, 9), 5), heads=(4, 2))
    whole_call = m.losses(call, CANDIDATES, "even", "rel_mse")
    monkeypatch.setattr(m, "SCORES", 1)
    assert m.losses(call, CANDIDATES, "even", "rel_mse") == pytest.approx(whole_call)
    at = m.sampled(call)
    assert len(at) == len(at.unique()) == m.QUERIES and at.min() >= 5 and at.max() < 581
    assert ((at - 5) // 72).bincount().tolist() == [32] * 8
    want = [explicit(call, k, "even", "rel_mse") for k in CANDIDATES]
    assert whole_call == pytest.approx(want, rel=0.1)


def test_attention_on_the_diagonal_needs_one_reference():
    """Frames whose keys answer to their own queries alone."""
    where = layout((6, 4, 4))
    frame = torch.nn.functional.one_hot(frames_of((6, 4, 4), 0), 16).float()[None, None]
    call = AttentionCall(frame * 30, frame * 30, torch.randn(1, 1, 96, 16), None, 0.25, "self", where, None, None)
    found = {0: dict(zip(CANDIDATES, m.losses(call, CANDIDATES, "even", "rel_mse"), strict=True))}
    assert max(found[0].values()) < 1e-9
    assert m.within_loss(found, 6, 0.01) == {0: 1} and m.within_loss(found, 6, 0.0) == {0: None}


def made(blocks, seed):
    pick = random.Random(seed)
    return {n: {k: pick.random() / k for k in CANDIDATES} for n in range(blocks)}


@pytest.mark.parametrize("seed", range(5))
def test_a_lower_threshold_is_never_sparser(seed):
    found, last = made(6, seed), None
    for threshold in (1.0, 0.5, 0.2, 0.1, 0.05, 0.0):
        plan = m.within_loss(found, 8, threshold)
        assert all(k is None or found[n][k] < threshold for n, k in plan.items())
        now = [m.density(8, k) for k in plan.values()]
        assert last is None or all(a <= b for a, b in zip(last, now, strict=True))
        last = now
    assert set(plan.values()) == {None}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [0.35, 0.5, 0.7, 0.9])
def test_a_density_is_kept_and_no_plan_of_it_loses_less(seed, budget):
    found = made(3, seed)
    plan = m.within_density(found, 8, budget)

    def cost(choice):
        return sum(m.density(8, k) for k in choice), sum(0 if k is None else found[n][k] for n, k in enumerate(choice))

    used, loss = cost(plan.values())
    assert used <= 3 * budget + 1e-9
    others = itertools.product((None, *CANDIDATES), repeat=3)
    assert all(lost >= loss - 1e-9 for other, lost in map(cost, others) if other <= used + 1e-9)


def test_ends_of_the_density():
    found = made(4, 3)
    assert set(m.within_density(found, 8, 1.0).values()) == {None}
    assert set(m.within_density(found, 8, 0.0).values()) == {1}
    assert m.density(8, None) == m.density(8, 8) == 1 and m.density(8, 2) == kept_tiles(8, 2) / 64
    assert m.within_loss({0: {8: 0.0}}, 8, 0.5) == {0: None}, "as many as frames is dense"


@pytest.mark.parametrize(("steps", "count", "want"), [(8, 4, {0, 2, 5, 7}), (3, 4, {0, 1, 2}), (9, 1, {4}), (1, 1, {0}), (20, 2, {0, 19})])  # fmt: skip
def test_the_steps_that_are_measured(steps, count, want):
    assert m.probed(steps, count) == want


def test_the_probe_leaves_every_call_to_the_others():
    probe, where = m.TileProbe(CANDIDATES, steps=1), layout((6, 3, 4))
    state = probe.begin()

    def met(step, where=where, mask=None):
        call = call_of(where, mask, block=2)
        clock = SimpleNamespace(step=step, steps=3)
        forward = SimpleNamespace(run=SimpleNamespace(clock=clock))
        call = AttentionCall(call.q, call.k, call.v, mask, call.scale, "self", where, call.block, forward)
        with pytest.raises(Decline) as reason:
            probe.attend(state, call)
        return str(reason.value)

    assert met(1) == met(1) == "measured" and met(0) == "not a step that is measured"
    assert met(1, layout((1, 3, 4))) == "a single frame" and "another number" in met(1, layout((5, 3, 4)))
    assert "differs between queries" in met(1, mask=torch.ones(1, 1, 72, 72).tril().bool())
    assert state.calls == {2: 2} and state.frames == 6 and set(state.mean()[2]) == set(CANDIDATES)
