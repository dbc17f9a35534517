import json
import math
from dataclasses import fields

import pytest
import torch
from segments_helper import call_of, layout, masked, seen, whole

from tessera.methods.attention import _segments
from tessera.methods.attention import tile as m
from tessera.methods.attention.call import Decline
from tessera.methods.attention.rehearsal import rehearse


def tiles(frames, refs):
    """Kept tiles bool [F, F], from the definition."""
    r = torch.zeros(frames, dtype=torch.bool)
    r[refs] = True
    return torch.eye(frames).bool() | r[:, None] | r[None]


@pytest.mark.parametrize("how", m.LAYOUTS)
@pytest.mark.parametrize("frames", [1, 2, 7, 8, 21, 24])
def test_tiles_follow_the_formula(frames, how):
    for k in range(frames + 2):
        refs = m.references(frames, k, how)
        assert len(set(refs)) == len(refs) == min(k, frames) and refs == sorted(refs)
        assert all(0 <= r < frames for r in refs)
        kept = min(k, frames)
        assert tiles(frames, refs).sum() == m.kept_tiles(frames, k) == kept * frames + (frames - kept) * (kept + 1)


@pytest.mark.parametrize(
    ("frames", "sparsity"),
    [(8, {4: 18.75, 3: 31.25, 2: 46.875, 1: 65.625}), (24, {12: 22.92, 8: 41.67, 6: 53.12, 4: 65.97, 3: 72.92})],
)
def test_sparsity_of_the_paper_settings(frames, sparsity):
    for k, percent in sparsity.items():
        assert 100 * (1 - m.kept_tiles(frames, k) / frames**2) == pytest.approx(percent, abs=0.01)


def test_where_the_references_are():
    assert m.references(21, 4) == [0, 7, 13, 20] and m.references(8, 1) == [0] and m.references(5, 2) == [0, 4]
    assert m.references(8, 3, "first") == [0, 1, 2] and m.references(8, 3, "last") == [5, 6, 7]
    for frames in range(2, 40):
        for k in range(2, frames):
            want = [math.floor(i * (frames - 1) / (k - 1) + 0.5) for i in range(k)]
            assert m.references(frames, k) == want


@pytest.mark.parametrize("how", m.LAYOUTS)
@pytest.mark.parametrize(
    ("grid", "before", "after"), [((7, 5, 11), 0, 0), ((5, 9, 7), 6, 0), ((5, 3, 3), 0, 9)], ids=str
)
@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_equals_the_explicit_mask(grid, before, after, k, how, error):
    """Frames are no multiple of a block."""
    method, where = m.Tile(k, how), layout(grid, before, after)
    call = call_of(where, heads=(4, 2))
    answer = method.attend(method.begin(), call)
    frame = torch.arange(grid[0]).repeat_interleave(grid[1] * grid[2])
    mask = torch.ones(where.total, where.total, dtype=torch.bool)
    mask[where.image, where.image] = tiles(grid[0], m.references(grid[0], k, how))[frame[:, None], frame[None]]
    assert error(answer.out, masked(call, mask)) < 1e-6
    each, image = grid[1] * grid[2], math.prod(grid)
    pairs = m.kept_tiles(grid[0], k) * each**2 + where.total**2 - image**2
    assert answer.pairs == 8 * pairs == 8 * mask.sum() and answer.dense_pairs == 8 * where.total**2
    assert torch.equal(seen(whole(where, m.frames_of(grid, k, how))), mask)


@pytest.mark.parametrize("block", [(128, 64), (64, 64)], ids=str)
@pytest.mark.parametrize(("k", "each"), [(1, 100), (2, 64), (3, 33)])
def test_lists_stay_within_a_block_of_each_tile_edge(k, each, block):
    frames = 9
    plan = _segments.build(m.frames_of((frames, 1, each), k), block)
    exact = m.kept_tiles(frames, k) * each**2
    edges = (frames + 1) * (block[0] + block[1]) * (k + 2) * (each + max(block))
    assert plan.pairs == exact <= plan.computed <= exact + edges


@pytest.mark.parametrize(("frames", "k", "reason"), [(4, 4, "every frame sees every frame"), (4, 9, "every frame sees every frame"),
                                                     (2, 1, "every frame sees every frame"), (1, 2, "a single frame")])  # fmt: skip
def test_what_is_dense_declines(frames, k, reason):
    """One frame and references besides it see everything too."""
    with pytest.raises(Decline, match=reason):
        m.Tile(k).attend({}, call_of(layout((frames, 3, 5), 4)))


def test_a_plan_gives_each_block_its_own_number():
    method = m.Tile(5, plan='{"frames": 6, "ref_layout": "even", "blocks": {"0": "dense", "1": 2, "2": 1, "3": 6}}')
    state, where, told = method.begin(), layout((6, 3, 4)), []
    for block in range(5):
        try:
            told.append(method.attend(state, call_of(where, block=block, count=5)).pairs / 4 / 144)
        except Decline as reason:
            told.append(str(reason))
    assert told == [
        "dense in the plan",
        m.kept_tiles(6, 2),
        m.kept_tiles(6, 1),
        "every frame sees every frame",
        "dense in the plan",
    ]
    assert m.Tile(5, plan="{}").planned and not m.Tile(5, plan=" \n").planned
    with pytest.raises(Decline, match="dense in the plan"):
        m.Tile(5, plan="{}").attend({}, call_of(where))


def test_a_plan_comes_back_from_json():
    blocks = {0: None, 3: 2, 11: 8}
    text = m.write_plan(blocks, 21, "even")
    assert m.parse_plan(text) == blocks == m.parse_plan(json.dumps(json.loads(text)["blocks"]))
    assert json.loads(text) == {"frames": 21, "ref_layout": "even", "blocks": {"0": "dense", "3": 2, "11": 8}}


@pytest.mark.parametrize("text", ["{", "[1, 2]", "3", '{"a": 2}', '{"0": -1}', '{"0": 1.5}', '{"0": "sparse"}', '{"-1": 2}',
                                  '{"0": true}', '{"blocks": 4}', '{"0": null}'])  # fmt: skip
def test_a_plan_that_cannot_be_read_is_refused(text):
    with pytest.raises(ValueError, match="plan: "):
        m.Tile(2, plan=text)


@pytest.mark.parametrize("wrong", [{"ref_frames": -1}, {"layout": "middle"}])
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="Reference frames"):
        m.Tile(**wrong)


@pytest.mark.parametrize("method", [m.Tile(4), m.Tile(1, "last"), m.Tile(plan='{"0": 2}')], ids=str)
def test_its_kernels_can_be_compiled_ahead(method):
    """The child that does so makes the method again from its plain settings, and lets it serve a clip."""
    settings = json.loads(json.dumps({f.name: getattr(method, f.name) for f in fields(method)}))
    assert m.Tile(**settings) == method
    rehearse(method, 2, 1, 16, torch.float32)
    with pytest.raises(Decline, match="dense in the plan"):
        rehearse(m.Tile(plan="{}"), 2, 1, 16, torch.float32)
