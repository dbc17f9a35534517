import math

import pytest
import torch
from segments_helper import call_of, layout, masked, seen, whole

from tessera.kernels.attention.reorder import coordinates
from tessera.methods.attention import diagonal as m
from tessera.methods.attention.call import Decline
from tessera.methods.attention.rehearsal import rehearse

GRIDS = [(1, 17, 23), (3, 8, 9), (5, 4, 6), (1, 1, 100), (2, 16, 16)]


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("order", m.ORDERS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blocks_hold_w_tokens_and_the_last_the_rest(grid, order, offset):
    """Of each frame in tile2d, else of the clip; with an offset the first holds half as many. Nothing wraps around."""
    w = 24
    label = m.Diagonal(w, order=order).blocks(grid, offset)
    parts = label.view(grid[0], -1) if order == "tile2d" else label[None]
    for part in parts:
        names, sizes = part.unique(return_counts=True)
        left, want = part.numel() - (w // 2 if offset else 0), [w // 2] if offset else []
        want += [w] * (left // w) + ([left % w] if left % w else [])
        assert sizes.tolist() == want, "in the order of their numbers"
    names = [set(part.tolist()) for part in parts]
    assert sum(map(len, names)) == len(set().union(*names)), "no block reaches into another frame"


def test_in_rows_a_block_is_a_run():
    assert m.Diagonal(4, order="none").blocks((1, 2, 5)).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert m.Diagonal(4, order="none").blocks((1, 2, 5), True).tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert m.Diagonal(3, order="none").blocks((1, 1, 7), True).tolist() == [0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(("order", "block", "sides"), [("tile2d", 64, (1, 8, 8)), ("tile3d", 64, (4, 4, 4))])
def test_a_block_is_a_patch(order, block, sides):
    grid = (8, 32, 32) if order == "tile2d" else (16, 16, 16)
    label = m.Diagonal(block, order=order).blocks(grid)
    at = coordinates(grid)
    for name in label.unique()[::7]:
        inside = at[label == name]
        assert (inside.amax(0) - inside.amin(0) + 1).tolist() == list(sides)


@pytest.mark.parametrize("text", m.TEXT)
@pytest.mark.parametrize("order", m.ORDERS)
@pytest.mark.parametrize(
    ("grid", "before", "after"), [((1, 17, 23), 7, 0), ((3, 8, 9), 0, 5), ((5, 4, 6), 0, 0)], ids=str
)
def test_equals_the_explicit_block_mask(grid, before, after, order, text, error):
    method, where = m.Diagonal(32, 1.0, order, "alternate_half", text), layout(grid, before, after)
    state = method.begin()
    for block in (0, 1):
        call = call_of(where, block=block, heads=(4, 2))
        answer = method.attend(state, call)
        mask = seen(whole(where, method.blocks(grid, block == 1), text))
        assert error(answer.out, masked(call, mask)) < 1e-6
        assert answer.pairs == 8 * mask.sum() and answer.dense_pairs == 8 * where.total**2
    assert len(state) == 2


@pytest.mark.parametrize("order", m.ORDERS)
def test_a_block_of_all_tokens_declines(order):
    grid = (1, 9, 7)
    for block in (63, 64, 1000):
        with pytest.raises(Decline, match="one block holds it all"):
            m.Diagonal(block, 1.0, order).attend({}, call_of(layout(grid, 4)))
    m.Diagonal(62, 1.0, order).attend({}, call_of(layout(grid, 4)))


@pytest.mark.parametrize(("depth", "served"), [(0.0, 0), (0.5, 3), (0.4, 2), (0.3, 2), (1.0, 5)])
def test_the_first_part_of_the_stack(depth, served):
    """A block takes part when it starts before that part of the stack ends."""
    method, told = m.Diagonal(16, depth), []
    for block in range(5):
        try:
            method.attend({}, call_of(layout((1, 6, 6)), block=block, count=5))
            told.append(block)
        except Decline as reason:
            assert str(reason) == "behind the diagonal part of the stack"
    assert told == list(range(served)) and math.ceil(5 * depth) == served


def test_a_block_is_not_told_of_another():
    call, method = call_of(layout((1, 8, 9)), batch=1), m.Diagonal(16, 1.0)
    before = method.attend({}, call).out
    inside = method.blocks((1, 8, 9)) == 2
    call.v[:, :, inside] += 1
    after = method.attend({}, call).out
    assert torch.equal(after[:, :, ~inside], before[:, :, ~inside]) and not torch.equal(after, before)


@pytest.mark.parametrize("wrong", [{"block": 0}, {"depth": 1.1}, {"depth": float("nan")}, {"order": "zorder"},
                                   {"offset": "half"}, {"text": "all"}])  # fmt: skip
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError):
        m.Diagonal(**wrong)


def test_its_kernels_can_be_compiled_ahead():
    rehearse(m.Diagonal(), 2, 1, 16, torch.float32)
