import itertools
import math

import pytest
import torch
from segments_helper import call_of, layout, masked, seen, whole

from tessera.methods.attention import window_3d as m
from tessera.methods.attention.call import Decline
from tessera.methods.attention.rehearsal import rehearse

GRIDS = [(1, 17, 23), (7, 8, 9), (5, 4, 6), (2, 1, 30), (1, 16, 16)]
WINDOWS = [(4, 4, 4), (1, 8, 8), (8, 3, 5), (2, 64, 1)]


def cuts(length, size, shifted):
    """First tokens of the windows along one axis, by hand."""
    if size >= length:
        return [0]
    first = size // 2 if shifted else size
    return [0, *range(first, length, size)] if first else [*range(0, length, size)]


def windows(grid, window, shifted):
    """Segments of the image tokens from those cuts, token by token."""
    of = []
    for length, size in zip(grid, window, strict=True):
        starts = cuts(length, size, shifted)
        of.append([max(i for i, s in enumerate(starts) if s <= at) for at in range(length)])
    names, label = {}, []
    for place in itertools.product(*of):
        label.append(names.setdefault(place, len(names)))
    return torch.tensor(label)


@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_windows_are_those_of_the_cuts(grid, window, shifted):
    label = m.Window3D(*window).windows(grid, shifted)
    want = windows(grid, window, shifted)
    assert torch.equal(seen(label), seen(want)) and label.min() >= 0
    sizes = label.unique(return_counts=True)[1]
    assert sizes.max() <= math.prod(min(a, b) for a, b in zip(grid, window, strict=True)), "nothing wraps around"


def test_a_shift_moves_by_half_a_window():
    method = m.Window3D(1, 1, 4)
    assert method.windows((1, 1, 10)).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert method.windows((1, 1, 10), True).tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("shift", "every", "blocks"),
    [  # of 8 blocks: w windowed, s shifted, g global
        ("alternate", 0, "wswswsws"),
        ("alternate", 2, "wgsgwgsg"),
        ("alternate", 3, "wsgwsgws"),
        ("none", 4, "wwwgwwwg"),
        ("always", 3, "ssgssgss"),
        ("alternate", 1, "gggggggg"),
    ],
)
def test_which_blocks_are_shifted_and_global(shift, every, blocks):
    method = m.Window3D(shift=shift, global_every=every)
    told = ["g" if method.is_global(n) else "s" if method.is_shifted(n) else "w" for n in range(8)]
    assert "".join(told) == blocks


@pytest.mark.parametrize("text", m.TEXT)
@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize(
    ("grid", "before", "after"), [((1, 17, 23), 7, 0), ((7, 8, 9), 0, 5), ((5, 4, 6), 0, 0)], ids=str
)
def test_equals_the_explicit_mask(grid, before, after, block, text, error):
    method, where = m.Window3D(3, 4, 5, "alternate", 0, text), layout(grid, before, after)
    call = call_of(where, block=block, heads=(4, 2))
    answer = method.attend(method.begin(), call)
    mask = seen(whole(where, windows(grid, (3, 4, 5), block == 1), text))
    assert error(answer.out, masked(call, mask)) < 1e-6
    assert answer.pairs == 8 * mask.sum() and answer.dense_pairs == 8 * where.total**2


def test_perturbing_one_window_leaves_the_others_bit_for_bit():
    """The test that the released code of DiT-3D fails."""
    grid, method = (7, 8, 9), m.Window3D(4, 4, 4, "alternate", 0)
    for block, batch in ((0, 1), (1, 2)):
        call = call_of(layout(grid), block=block, batch=batch)
        before = method.attend(method.begin(), call).out
        inside = method.windows(grid, block == 1) == method.windows(grid, block == 1)[200]
        for x in (call.q, call.k, call.v):
            x[:, :, inside] += torch.randn_like(x[:, :, inside])
        after = method.attend(method.begin(), call).out
        assert torch.equal(after[:, :, ~inside], before[:, :, ~inside])
        assert (after[:, :, inside] != before[:, :, inside]).any(-1).all()


@pytest.mark.parametrize("shift", m.SHIFTS)
def test_a_window_over_the_whole_grid_declines(shift):
    method = m.Window3D(7, 8, 9, shift, 0)
    for block in (0, 1):
        with pytest.raises(Decline, match="one window spans it all"):
            method.attend(method.begin(), call_of(layout((7, 8, 9), 3), block=block))


def test_plain_and_shifted_plans_are_kept_for_the_run():
    method = m.Window3D(4, 4, 4, "alternate", 0)
    state = method.begin()
    for block in range(4):
        method.attend(state, call_of(layout((7, 8, 9)), block=block))
    assert len(state) == 2
    with pytest.raises(Decline, match="a global block"):
        m.Window3D(4, 4, 4, global_every=2).attend(state, call_of(layout((7, 8, 9)), block=1))


@pytest.mark.parametrize("wrong", [{"wt": 0}, {"ww": -3}, {"global_every": -1}, {"shift": "roll"}, {"text": "all"}])
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError):
        m.Window3D(**wrong)


def test_its_kernels_can_be_compiled_ahead():
    rehearse(m.Window3D(), 2, 1, 16, torch.float32)
