"""Which cells of image tokens are smooth enough to become one token (the dynamic grain of D2iT, arXiv 2504.09454, carried
over to models that were not trained for it). Tokens lie in a grid (T, H, W), row-major; cells never overlap, and tokens at
a border that fills no cell stay fine."""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import adaptive_max_pool2d, interpolate

from ...kernels.tokens.cell_entropy import cell_entropy
from ...kernels.tokens.merge_cells import merge_cells

Grid = tuple[int, int, int]
CELLS: dict[str, Grid] = {"2x2": (1, 2, 2), "4x4": (1, 4, 4), "2x2x2": (2, 2, 2)}  # tokens (t, h, w)
MEASURES = ("variance", "entropy")
BINS, SIGMA = 64, 0.01  # of the entropy, for values from 0 to 1


@dataclass(frozen=True)
class Grain:
    """Which tokens became one, the same count in each sample: `fine` tokens stay, then come the cells of `size` each."""

    order: torch.Tensor  # [b, N] int64: places of the fine tokens, then those of the cells
    owner: torch.Tensor  # [b, N] int64: the merged token of each place
    fine: int
    size: int

    @property
    def merged(self) -> int:
        """Tokens that are left of all."""
        return self.fine + (self.order.shape[1] - self.fine) // self.size

    def repeated(self, times: int) -> "Grain":
        """For that many prompts, one after the other."""
        return Grain(self.order.repeat(times, 1), self.owner.repeat(times, 1), self.fine, self.size)


def cell_members(grid: Grid, cell: Grid) -> torch.Tensor:
    """Places of the tokens of every whole cell [cells, size], row-major; a cell has at most the frames there are."""
    cell = (min(cell[0], grid[0]), *cell[1:])
    counts = [n // c for n, c in zip(grid, cell, strict=True)]
    places = torch.arange(math.prod(grid)).view(grid)[tuple(slice(n * c) for n, c in zip(counts, cell, strict=True))]
    parts = [size for pair in zip(counts, cell, strict=True) for size in pair]
    return places.reshape(parts).permute(0, 2, 4, 1, 3, 5).reshape(math.prod(counts), math.prod(cell))


def coarse_count(cells: int, fraction: float, free: int) -> int:
    """Cells that are merged, of so many of which `free` may be."""
    return min(math.floor(fraction * cells + 1e-6), free)


def grain_of(score: torch.Tensor, members: torch.Tensor, tokens: int, count: int) -> Grain:
    """score [b, cells]: the `count` lowest cells of each sample are merged; of equal ones the first."""
    members = members.to(score.device)
    b, size = score.shape[0], members.shape[1]
    chosen = score.nan_to_num(nan=math.inf).argsort(dim=1, stable=True)[:, :count].sort(1).values
    cells = members[chosen].flatten(1)  # [b, count * size]
    merged = torch.zeros(b, tokens, dtype=torch.uint8, device=score.device).scatter_(1, cells, 1)
    order = torch.cat((merged.argsort(dim=1, stable=True)[:, : tokens - cells.shape[1]], cells), 1)
    fine = tokens - cells.shape[1]
    numbers = torch.cat((torch.arange(fine), fine + torch.arange(count).repeat_interleave(size))).to(score.device)
    owner = torch.empty_like(order).scatter_(1, order, numbers.expand(b, -1))
    return Grain(order, owner, fine, size)


def cell_values(x: torch.Tensor, grid: Grid, members: torch.Tensor) -> torch.Tensor:
    """A latent x [b, C, (T,) H, W] -> what the cells hold [b, cells, C, size * pixels of a token], fp32."""
    x = (x if x.ndim == 5 else x[:, :, None]).float()
    patch = [-(-n // g) for n, g in zip(x.shape[2:], grid, strict=True)]
    full = [g * p for g, p in zip(grid, patch, strict=True)]
    if full != [*x.shape[2:]]:
        x = interpolate(x, size=full, mode="nearest-exact")
    b, c = x.shape[:2]
    parts = [size for pair in zip(grid, patch, strict=True) for size in pair]
    pixels = x.reshape(b, c, *parts).permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, math.prod(grid), c, -1)
    return pixels[:, members.to(x.device)].transpose(2, 3).flatten(3)


def smoothness(x: torch.Tensor, grid: Grid, members: torch.Tensor, measure: str) -> torch.Tensor:
    """How much each cell of a latent holds [b, cells], lowest for flat ones, every channel by its own range."""
    values = cell_values(x, grid, members)
    if measure == "variance":
        spread = x.float().flatten(2).var(2, correction=0).clamp_min(1e-12)
        return (values.var(3, correction=0) / spread[:, None]).mean(2)
    low, high = x.float().flatten(2).aminmax(dim=2)
    scaled = (values - low[:, None, :, None]) / (high - low).clamp_min(1e-12)[:, None, :, None]
    return cell_entropy(scaled.flatten(0, 2), BINS, SIGMA).view(scaled.shape[:3]).mean(2)


def forced(mask: torch.Tensor, grid: Grid, members: torch.Tensor) -> torch.Tensor:
    """A MASK [F, H, W], its frames spread over those of the grid -> bool [cells]: those that it touches."""
    touched = adaptive_max_pool2d(mask[:, None].float(), grid[1:])[:, 0] > 0.5
    frames = touched[(torch.arange(grid[0]) * len(touched)) // grid[0]]
    return frames.flatten()[members].any(1)


def merge_rotations(pe: torch.Tensor, order: torch.Tensor, fine: int, size: int) -> torch.Tensor:
    """Rotations [b, N, ..., 2, 2] of tokens -> of the merged ones: a cell turns by the mean of its angles, its centre's.

    Matrices of angles that lie evenly about their mean add up to a multiple of the mean's."""
    mean = merge_cells(pe.flatten(2).float(), order, fine, size).view(pe.shape[0], -1, *pe.shape[2:])
    length = (mean[..., 0, 0] * mean[..., 1, 1] - mean[..., 0, 1] * mean[..., 1, 0]).clamp_min(1e-12).sqrt()
    turned = (mean / length[..., None, None])[:, fine:]
    return torch.cat((mean[:, :fine], turned), 1).to(pe.dtype)
