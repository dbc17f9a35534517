"""Local windows written down from the definition, to hold plans against."""

import math

import torch

from tessera.archs import Layout

CASES = [  # grid, tokens before the image, after it, radius, metric, temporal radius
    ((1, 17, 23), 0, 0, 5, "circle", 0),
    ((1, 17, 23), 77, 0, 4, "square", 0),
    ((1, 9, 15), 512, 0, 3, "circle", 0),
    ((1, 15, 16), 3, 77, 6, "circle", 0),
    ((5, 9, 11), 0, 20, 4, "circle", 1),
    ((3, 7, 13), 2, 0, 3, "square", 0),
    ((4, 8, 8), 0, 0, 1, "circle", 3),
]
BLOCKS = [(64, 16), (128, 64), (32, 32)]


def layout(grid, before=0, after=0):
    n = math.prod(grid)
    return Layout(grid, slice(before, before + n), before + n + after)


def explicit(case):
    """The window as a bool mask [N, N] in sequence order, written down from the definition."""
    grid, before, after, r, metric, rt = case
    n = math.prod(grid)
    t, y, x = torch.meshgrid(*(torch.arange(s) for s in grid), indexing="ij")
    t, y, x = (a.flatten()[:, None] - a.flatten()[None] for a in (t, y, x))
    near = (y**2 + x**2 < r**2) if metric == "circle" else (y.abs() < r) & (x.abs() < r)
    mask = torch.ones(before + n + after, before + n + after, dtype=torch.bool)
    mask[before : before + n, before : before + n] = near & (t.abs() <= rt)
    return mask
