import math

import pytest
import torch

from tessera.kernels.attention import reorder as m

GRIDS = [(1, 1, 1), (1, 16, 16), (1, 17, 23), (3, 9, 11), (5, 1, 7), (2, 3, 64)]


def spans(grid, order, size):
    """Tokens along (t, y, x) that each run of `size` tokens covers."""
    runs = m.coordinates(grid)[order].split(size)
    return torch.stack([run.amax(0) - run.amin(0) + 1 for run in runs])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("blocks", [(64, 16), (16,), (1,), (48, 20), (1024,)], ids=str)
def test_compact_order_is_a_permutation(grid, blocks):
    order = m.compact_order(grid, blocks)
    n = math.prod(grid)
    assert order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(n))
    x = torch.randn(n)
    assert torch.equal(x[order][m.inverse(order)], x)


@pytest.mark.parametrize(
    ("blocks", "size", "span"), [((64, 16), 64, 8), ((64, 16), 16, 4), ((64,), 64, 8), ((16,), 16, 4)]
)
def test_powers_of_two_give_squares(blocks, size, span):
    order = m.compact_order((1, 32, 64), blocks)
    assert torch.equal(spans((1, 32, 64), order, size), torch.tensor([1, span, span]).expand(2048 // size, 3))


@pytest.mark.parametrize("grid", [(1, 61, 47), (1, 30, 52), (1, 100, 33), (7, 30, 52)], ids=str)
@pytest.mark.parametrize("size", [128, 64, 16])
def test_runs_of_ragged_grids_are_compact(grid, size):
    """A run's box holds few tokens besides the run's own, and is far smaller than that of raster order."""
    compact, raster = (
        spans(grid, order, size).double()
        for order in (m.compact_order(grid, (128, 64, 16)), torch.arange(math.prod(grid)))
    )
    assert compact.prod(1).mean() < 3 * size
    assert compact.sum(1).mean() < 0.75 * raster.sum(1).mean()


def test_weight_says_which_axis_is_kept_short():
    grid = (8, 16, 16)
    still = spans(grid, m.compact_order(grid, (64,), (100.0, 1.0, 1.0)), 64)
    assert (still[:, 0] == 1).all() and (still[:, 1:] == 8).all()
    long = spans(grid, m.compact_order(grid, (64,), (0.01, 1.0, 1.0)), 64)
    assert (long[:, 0] == 8).all() and (long[:, 1] * long[:, 2] == 8).all()


def test_runs_hold_whole_pieces_of_rows():
    """A cut may end inside a row, but leaves no hole: what block maps rely on."""
    for grid in GRIDS:
        for run in m.coordinates(grid)[m.compact_order(grid, (48, 16))].split(16):
            for t, y in {(int(t), int(y)) for t, y, _ in run}:
                x = run[(run[:, 0] == t) & (run[:, 1] == y), 2]
                assert int(x.max() - x.min()) + 1 == len(x)


@pytest.mark.parametrize("tile", [(1, 4, 4), (2, 3, 5), (8, 32, 128), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_tile_order_keeps_tiles_together(grid, tile):
    order = m.tile_order(grid, tile)
    at = m.coordinates(grid)[order]
    assert torch.equal(order.sort().values, torch.arange(len(order)))
    number = torch.stack([at[:, i] // tile[i] for i in range(3)], 1)
    counts = [-(-n // s) for n, s in zip(grid, tile, strict=True)]
    flat = (number[:, 0] * counts[1] + number[:, 1]) * counts[2] + number[:, 2]
    assert (flat.diff() >= 0).all() and len(flat.unique()) == math.prod(counts)
    inside = order[:-1][flat.diff() == 0] < order[1:][flat.diff() == 0]
    assert inside.all(), "row-major within a tile"


def morton(t, y, x):
    """Interleaved bits of three numbers of equal length, one bit at a time."""
    return sum(((n >> bit) & 1) << (3 * bit + place) for bit in range(8) for place, n in enumerate((x, y, t)))


@pytest.mark.parametrize("grid", [*GRIDS, (1, 1, 37), (3, 1, 1), (5, 6, 7)], ids=str)
def test_zorder_is_a_permutation(grid):
    order = m.zorder(grid)
    n = math.prod(grid)
    assert order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(n))
    x = torch.randn(n)
    assert torch.equal(x[order][m.inverse(order)], x) and torch.equal(x[m.inverse(order)][order], x)


@pytest.mark.parametrize("grid", [(4, 4, 4), (5, 6, 7), (8, 5, 8)], ids=str)
def test_zorder_follows_the_morton_code(grid):
    codes = [morton(*at) for at in m.coordinates(grid)[m.zorder(grid)].tolist()]
    assert codes == sorted(codes)


def test_zorder_of_squares_is_recursive():
    order = m.zorder((1, 8, 8))
    assert order[:16].tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 16, 17, 24, 25, 18, 19, 26, 27]
    for run, side in ((4, 2), (16, 4)):
        assert torch.equal(spans((1, 8, 8), order, run), torch.tensor([1, side, side]).expand(64 // run, 3))
    assert torch.equal(spans((4, 4, 4), m.zorder((4, 4, 4)), 8), torch.full((8, 3), 2))
    assert torch.equal(m.zorder((1, 1, 13)), torch.arange(13))


def test_zorder_of_unequal_sides_fills_its_blocks():
    """An axis that is out of bits leaves them to the others: runs stay whole boxes."""
    grid = (2, 4, 32)
    for run in (8, 16, 64):
        assert (spans(grid, m.zorder(grid), run).prod(1) == run).all()


@pytest.mark.parametrize(
    ("block", "axes", "tile"),
    [
        (16, 1, (1, 1, 16)),
        (16, 2, (1, 4, 4)),
        (32, 2, (1, 4, 8)),
        (16, 3, (2, 2, 4)),
        (64, 3, (4, 4, 4)),
        (1, 2, (1, 1, 1)),
    ],
)
def test_tile_shape(block, axes, tile):
    assert m.tile_shape(block, axes) == tile and math.prod(tile) == block


@pytest.mark.parametrize("call", [lambda: m.compact_order((1, 4, 4), (0,)), lambda: m.compact_order((1, 4, 4), ()),
                                  lambda: m.tile_order((1, 4, 4), (1, 0, 2))])  # fmt: skip
def test_empty_blocks_are_refused(call):
    with pytest.raises(ValueError, match="at least 1 token"):
        call()


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at least 1 token"):
        m.zorder((1, 0, 4))
    for block, axes in ((24, 2), (0, 2), (16, 4)):
        with pytest.raises(ValueError, match="power of two"):
            m.tile_shape(block, axes)
