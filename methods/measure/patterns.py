"""Sparse patterns as curves: how much attention mass each of their settings would keep, for sampled queries.

A pattern has settings in ascending order, each with its density (share of the query-key pairs between image tokens).
Where the settings are nested, the keys (or groups of keys) of a query are ordered so that each setting keeps the first
few of them; the mass kept by all settings then is one running sum.

    window    keys within a disc of this radius, as Local Window Attention (and within `frames` frames)
    blocks    the key patches whose mean scores highest for the mean query of the query's patch, as the finest level of
              Log-Linear Sparse Attention and other block top-k methods
    tokens    the keys that weigh most: no method can keep more mass with as many keys
    diagonal  the query's own patch of this many tokens: Diagonal Attention, order tile3d
    tile      all keys of the query's own frame and of so many reference frames, all frames for queries in these:
              Attention Tile, ref_layout even
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...archs import Layout
from ...kernels.attention.pool import pool
from ...kernels.attention.reorder import compact_order, coordinates, inverse
from ..attention.diagonal import Diagonal
from ..attention.local_window import Window
from ..attention.tile import kept_tiles, references

PATTERNS = {"blocks": "density", "window": "radius", "tokens": "density", "diagonal": "patch", "tile": "frames"}
SHARES = (0.002, 0.005, *(i / 100 for i in range(1, 101)))  # settings of the patterns that have none of their own
SMALLEST_PATCH = 16


@dataclass(frozen=True)
class Settings:
    """pattern: a name of PATTERNS. block: tokens of a patch. frames: reach of the window in time, -1 for all."""

    pattern: str = "blocks"
    density: float = 0.25
    block: int = 16
    frames: int = -1

    def __post_init__(self):
        if self.pattern not in PATTERNS:
            raise ValueError(f"Unknown pattern {self.pattern!r}. Use one of {', '.join(PATTERNS)}.")
        if not 0 < self.density <= 1 or self.block < 1 or self.frames < -1:
            raise ValueError(
                f"A pattern needs a density above 0 up to 1, a block of at least 1 token and frames of at least -1, "
                f"got {self.density}, {self.block} and {self.frames}."
            )


Keep = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Curve:
    """One pattern on one layout. values [V] of its setting, their densities [V] and what they are as whole numbers [V]
    (patches, tokens, radius, frames), ascending; keep(share [h, s, n] of
    some heads and sampled queries over the image keys, their scores of prepare, which of the samples they are) -> kept
    mass fp64 [h, s, V]."""

    values: list[float]
    densities: list[float]
    amounts: list[int]
    queries: torch.Tensor  # int64 [S], the sampled image tokens
    keep: Keep
    prepare: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # q [H, n, D], k [Hkv, n, D] -> [H, S, groups]

    def at(self, density: float) -> int:
        """The first setting with this density or more; the last where none has."""
        reach = (i for i, found in enumerate(self.densities) if found >= density - 1e-6)
        return next(reach, len(self.values) - 1)


def curve(settings: Settings, layout: Layout, samples: int, seed: int, device: torch.device | str = "cpu") -> Curve:
    """The queries are drawn by the seed, on the CPU: the same on every device."""
    n = layout.image.stop - layout.image.start
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    return {"window": _window, "blocks": _blocks, "tokens": _tokens, "diagonal": _diagonal, "tile": _tile}[
        settings.pattern
    ](settings, layout.grid, drawn, torch.device(device))


def running(mass: torch.Tensor, order: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """mass [H, S, n], order int64 [S, n] or [H, S, n], ends int64 [V] or [S, V] -> the mass of the first `ends` keys in
    that order, fp64 [H, S, V]."""
    total = mass.gather(-1, order.expand(mass.shape)).cumsum(-1, dtype=torch.float64)
    ends = ends.expand(*mass.shape[:2], ends.shape[-1])
    return total.gather(-1, (ends - 1).clamp_min(0)).masked_fill_(ends == 0, 0)


def counts(shares: list[float], n: int) -> list[int]:
    """How many of n a share keeps, as the nodes round it."""
    return [min(n, max(1, math.ceil(share * n))) for share in shares]


def _no_scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q[:, :0, :0]


def _shares(settings: Settings) -> list[float]:
    return sorted({*SHARES, settings.density})


def _tokens(settings, grid, drawn, device) -> Curve:
    shares, n = _shares(settings), math.prod(grid)
    kept = counts(shares, n)
    ends = torch.tensor(kept, device=device)

    def keep(share, scores, part):
        return running(share, share.argsort(-1, descending=True), ends)

    return Curve(shares, shares, kept, drawn.to(device), keep, _no_scores)


def _blocks(settings, grid, drawn, device) -> Curve:
    shares, n, block = _shares(settings), math.prod(grid), settings.block
    sizes = [block]
    while sizes[-1] * block < n:
        sizes.append(sizes[-1] * block)
    order = compact_order(grid, tuple(sizes))
    own, order = (inverse(order)[drawn] // block).to(device), order.to(device)
    patches = -(-n // block)
    kept = counts(shares, patches)
    ends = torch.tensor(kept, device=device)

    def prepare(q, k):
        means = [pool(x.index_select(1, order)[None], block)[0].float() for x in (q, k)]
        return means[0][:, own] @ means[1].repeat_interleave(len(q) // len(k), 0).transpose(1, 2)

    def keep(share, scores, part):
        mass = torch.nn.functional.pad(share.index_select(-1, order), (0, patches * block - n))
        mass = mass.unflatten(-1, (patches, block)).sum(-1, dtype=torch.float64)
        return running(mass, scores.argsort(stable=True, dim=-1, descending=True), ends)

    return Curve(shares, shares, kept, drawn.to(device), keep, prepare)


def _ranked(levels: torch.Tensor, values: int, device):
    """(order, ends) for levels int [S, n]: the first setting that keeps the key, `values` for none."""
    order = levels.argsort(stable=True).to(device)
    ends = torch.searchsorted(levels.sort(-1).values, torch.arange(values).expand(len(levels), -1).contiguous() + 1)
    return order, ends.to(device)


def _by_rank(values, densities, levels, drawn, device) -> Curve:
    order, ends = _ranked(levels, len(values), device)

    def keep(share, scores, part):
        return running(share, order[part], ends[part])

    return Curve(values, densities, [int(x) for x in values], drawn.to(device), keep, _no_scores)


def _window(settings, grid, drawn, device) -> Curve:
    n, at = math.prod(grid), coordinates(grid)
    frames = grid[0] - 1 if settings.frames < 0 else settings.frames
    dt, dy, dx = (at[drawn, None] - at[None]).abs().unbind(-1)
    reach = math.isqrt((grid[1] - 1) ** 2 + (grid[2] - 1) ** 2) + 1
    levels = (dy**2 + dx**2).double().sqrt().long().masked_fill(dt > frames, reach)
    values = [float(r) for r in range(1, reach + 1)]
    densities = [Window(r, "circle", frames).pairs(grid) / n**2 for r in range(1, reach + 1)]
    return _by_rank(values, densities, levels, drawn, device)


def _diagonal(settings, grid, drawn, device) -> Curve:
    n, patches = math.prod(grid), [SMALLEST_PATCH]
    while patches[-1] < n:
        patches.append(2 * patches[-1])
    number = torch.stack([Diagonal(size, order="tile3d").blocks(grid) for size in patches])  # [V, n]
    densities = [(n // size * size**2 + (n % size) ** 2) / n**2 for size in patches]
    number, own = number.to(device), number[:, drawn].to(device)

    def keep(share, scores, part):  # each size cuts the picture anew: no order of keys serves them all
        kept = [
            share.masked_fill(mine[part, None] != every, 0).sum(-1, dtype=torch.float64)
            for mine, every in zip(own, number, strict=True)
        ]
        return torch.stack(kept, -1)

    return Curve([float(size) for size in patches], densities, patches, drawn.to(device), keep, _no_scores)


def _tile(settings, grid, drawn, device) -> Curve:
    frames, area = grid[0], grid[1] * grid[2]
    own, kept = drawn // area, torch.zeros(len(drawn), frames, frames, dtype=torch.bool)  # [S, V, frames]
    for count in range(1, frames + 1):
        chosen = torch.zeros(frames, dtype=torch.bool)
        chosen[references(frames, count)] = True
        kept[:, count - 1] = chosen | chosen[own, None] | (own[:, None] == torch.arange(frames))
    weights = kept.to(device, torch.float64)
    densities = [kept_tiles(frames, k) / frames**2 for k in range(1, frames + 1)]

    def keep(share, scores, part):
        mass = share.unflatten(-1, (frames, area)).sum(-1, dtype=torch.float64)
        return torch.einsum("hsf,svf->hsv", mass, weights[part])

    numbers = [*range(1, frames + 1)]
    return Curve([float(k) for k in numbers], densities, numbers, drawn.to(device), keep, _no_scores)
