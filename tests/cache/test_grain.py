"""Cells, their smoothness, and the map of a picture: counts exact, borders fine, rotations those of the centre."""

import math

import pytest
import torch

from tessera.kernels.tokens.merge_cells import merge_cells
from tessera.methods.cache import grain as g


@pytest.mark.parametrize(
    "grid, cell, cells, size",
    [((1, 4, 6), (1, 2, 2), 6, 4), ((1, 5, 7), (1, 2, 2), 6, 4), ((3, 4, 4), (2, 2, 2), 4, 8), ((1, 4, 4), (2, 2, 2), 4, 4),
     ((1, 3, 9), (1, 4, 4), 0, 16), ((2, 9, 8), (1, 4, 4), 8, 16)],
)  # fmt: skip
def test_cells_are_squares_and_borders_stay(grid, cell, cells, size):
    members = g.cell_members(grid, cell)
    assert members.shape == (cells, size) and members.unique().numel() == members.numel()
    places = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).view(-1, 3)
    for row in members:
        extent = places[row].max(0).values - places[row].min(0).values + 1
        assert extent.prod() == size and extent.tolist() == [min(cell[0], grid[0]), *cell[1:]]


def test_the_map_merges_the_lowest_and_counts_are_exact():
    members = g.cell_members((1, 5, 6), (1, 2, 2))
    score = torch.tensor([[0.0, 5, 1, 3, 4, 2], [7.0, 7, 7, 7, 7, 7]])
    found = g.grain_of(score, members, 30, g.coarse_count(6, 0.5, 6))
    assert (found.fine, found.size, found.merged) == (18, 4, 21)
    for b, want in enumerate(([0, 2, 5], [0, 1, 2])):
        assert found.order[b, 18:].view(3, 4).tolist() == members[want].tolist()
        assert found.order[b, :18].tolist() == sorted({*range(30)} - {*members[want].flatten().tolist()})
        spread = torch.cat((torch.arange(18), 18 + torch.arange(3).repeat_interleave(4)))
        assert torch.equal(found.owner[b, found.order[b]], spread)
    assert found.repeated(2).order.shape == (4, 30)


@pytest.mark.parametrize(
    "cells, fraction, free, count", [(6, 0.5, 6, 3), (7, 0.5, 7, 3), (6, 0.95, 2, 2), (6, 0.0, 6, 0), (10, 0.3, 10, 3)]
)
def test_counts(cells, fraction, free, count):
    assert g.coarse_count(cells, fraction, free) == count


@pytest.mark.parametrize("measure", g.MEASURES)
@pytest.mark.parametrize("shape", [(2, 4, 8, 12), (2, 4, 1, 7, 11)], ids=str)
def test_flat_cells_are_smoothest(measure, shape):
    x = torch.randn(shape)
    x[0, ..., :4, 4:8] = 0.3
    grid = (1, -(-shape[-2] // 2), -(-shape[-1] // 2))
    members = g.cell_members(grid, (1, 2, 2))
    score = g.smoothness(x, grid, members, measure)
    assert score.shape == (2, len(members)) and score[0].argmin() == 1
    assert score[0, 1] < 0.7 * score[0, [0, 2]].min() and score[1].min() > score[0, 1]


def test_values_are_those_of_the_cell():
    x = torch.arange(2 * 3 * 4 * 8.0).view(1, 2, 3, 4, 8)
    values = g.cell_values(x, (3, 2, 4), g.cell_members((3, 2, 4), (1, 2, 2)))
    assert values.shape == (1, 6, 2, 16)
    assert values[0, 3, 1].sort().values.tolist() == x[0, 1, 1, :, 4:].flatten().sort().values.tolist()


def test_a_mask_touches_cells():
    mask = torch.zeros(2, 8, 12)
    mask[1, 1, 5] = 1
    members = g.cell_members((4, 4, 6), (1, 2, 2))
    assert g.forced(mask, (4, 4, 6), members).nonzero().flatten().tolist() == [13, 19]  # frames 2 and 3 show its second


@pytest.mark.parametrize("side", [2, 4])
def test_a_cell_turns_by_the_angle_of_its_centre(side):
    """Angles are linear in the place; the fastest turns one radian a token."""
    omega = torch.tensor([1.0, 0.3, 0.01])
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    rotation = lambda a: torch.stack((a.cos(), -a.sin(), a.sin(), a.cos()), -1).unflatten(-1, (2, 2))  # noqa: E731
    angles = torch.cat((y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega), 1)
    members = g.cell_members((1, 8, 8), (1, side, side))
    found = g.grain_of(torch.zeros(1, len(members)), members, 64, 2)
    merged = g.merge_rotations(rotation(angles)[None, :, None], found.order, found.fine, found.size)
    centres = angles[found.order[0, found.fine :].view(2, -1)].mean(1)
    assert torch.allclose(merged[0, found.fine :, 0], rotation(centres), atol=1e-4)
    assert torch.allclose(merged[0, : found.fine, 0], rotation(angles)[found.order[0, : found.fine]], atol=1e-6)


def test_a_sample_is_merged_alone():
    x = torch.randn(2, 24, 5)
    members = g.cell_members((1, 4, 6), (1, 2, 2))
    both = g.grain_of(torch.tensor([[3.0, 1, 2, 0, 5, 4], [0.0, 1, 2, 3, 4, 5]]), members, 24, 2)
    merged = merge_cells(x, both.order, both.fine, both.size)
    assert torch.allclose(merged[0, 16], x[0, members[1]].mean(0), atol=1e-6)
    assert torch.allclose(merged[1, 17], x[1, members[1]].mean(0), atol=1e-6)
    assert both.merged == 18 and math.prod(merged.shape) == 2 * 18 * 5
