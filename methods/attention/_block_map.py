"""Which pairs of token blocks a spatial rule leaves something to compute for, exactly, without looking at every pair
of tokens: bounding boxes decide where they are full, elsewhere the runs of image rows that a block holds do."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Inside = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # distances along t, y, x -> allowed

BLOCK_PAIRS = 1 << 18  # block pairs whose boxes are compared at once
ROW_PAIRS = 1 << 18  # pairs of image rows whose distance is compared at once


def block_map(coords: torch.Tensor, inside: Inside, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """coords int32 [N, 3] of tokens in an order of compact_order (a block then cuts image rows, but leaves no holes in
    them), t = -1 for the tokens that see and are seen by all; inside is monotone: nearer is no worse; block (queries,
    keys) -> bool [nQ, nK]: the block pair holds an allowed pair; bool [nQ, nK]: all its pairs are allowed."""
    queries, keys = (_boxes(coords, size) for size in block)
    some = torch.zeros(len(queries.low), len(keys.low), dtype=torch.bool)
    whole, unsure = some.clone(), some.clone()
    step = max(1, BLOCK_PAIRS // len(keys.low))
    for start in range(0, len(queries.low), step):
        part = slice(start, start + step)
        low, high = queries.low[part, None], queries.high[part, None]
        near = inside(*torch.maximum(keys.low - high, low - keys.high).clamp_min_(0).unbind(-1))
        all_in = inside(*torch.maximum(keys.high - low, high - keys.low).unbind(-1))
        other = (queries.image[part, None] == 0) | (keys.image == 0)
        some[part], whole[part] = near | queries.free[part, None] | keys.free, all_in | other
        unsure[part] = (near & ~all_in & ~other) & ~(queries.full[part, None] & keys.full)
    rows, cols = unsure.nonzero(as_tuple=True)
    step = max(1, ROW_PAIRS // (queries.runs.shape[1] * keys.runs.shape[1]))
    for start in range(0, len(rows), step):
        at = rows[start : start + step], cols[start : start + step]
        q, k = queries.runs[at[0]][:, :, None], keys.runs[at[1]][:, None]
        dt, dy = ((q[..., i] - k[..., i]).abs_() for i in (0, 1))
        gap = torch.maximum(k[..., 2] - q[..., 3], q[..., 2] - k[..., 3]).clamp_min_(0)
        far = torch.maximum(k[..., 3] - q[..., 2], q[..., 3] - k[..., 2])
        some[at] = inside(dt, dy, gap).flatten(1).any(1) | queries.free[at[0]] | keys.free[at[1]]
        whole[at] = inside(dt, dy, far).flatten(1).all(1)
    return some, whole


def lists(some: torch.Tensor, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Block maps bool [nQ, nK] -> idx int32 [1, 1, nQ, W], cnt int32 [1, 1, nQ], mode int8 (0: whole) like idx."""
    cnt = some.sum(1)
    rows, cols = some.nonzero(as_tuple=True)
    slots = torch.arange(len(rows)) - (cnt.cumsum(0) - cnt)[rows]
    idx = torch.zeros(len(some), int(cnt.max()), dtype=torch.int32)
    mode = torch.zeros(idx.shape, dtype=torch.int8)
    idx[rows, slots] = cols.int()
    mode[rows, slots] = (~whole[rows, cols]).to(torch.int8)
    return idx[None, None], cnt.int()[None, None], mode[None, None]


@dataclass(frozen=True)
class _Boxes:
    """The n blocks of one side."""

    low: torch.Tensor  # int32 [n, 3], lowest (t, y, x) of the image tokens
    high: torch.Tensor  # int32 [n, 3], highest
    image: torch.Tensor  # int64 [n], image tokens
    full: torch.Tensor  # bool [n], they fill the box
    free: torch.Tensor  # bool [n], the block holds tokens that see all
    runs: torch.Tensor  # int32 [n, S, 4], (t, y, first x, last x); the last run repeats up to S


def _boxes(coords: torch.Tensor, size: int) -> _Boxes:
    n = -(-len(coords) // size)
    number = torch.arange(len(coords)) // size
    inside = coords[:, 0] >= 0
    at, block = coords[inside], number[inside]
    image = block.bincount(minlength=n)
    low, high = _extent(at, block, n)
    depth, height = (int(at[:, i].max()) + 1 for i in (0, 1))
    name, run = ((block * depth + at[:, 0]) * height + at[:, 1]).unique(return_inverse=True)
    first, last = _extent(at[:, 2:], run, len(name))
    runs = torch.stack([name // height % depth, name % height, first[:, 0], last[:, 0]], 1).int()
    count = (name // (height * depth)).bincount(minlength=n)
    slots = torch.minimum(torch.arange(int(count.max())), (count - 1).clamp_min(0)[:, None])
    rows = ((count.cumsum(0) - count)[:, None] + slots).clamp_max(len(runs) - 1)
    free = number[~inside].bincount(minlength=n) > 0
    return _Boxes(low, high, image, (high - low + 1).prod(1) == image, free, runs[rows])


def _extent(x: torch.Tensor, group: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest x int32 [N, C] of each of n groups; 0 for an empty one."""
    to, at = x.new_zeros(n, x.shape[1]), group[:, None].expand_as(x)
    return to.scatter_reduce(0, at, x, "amin", include_self=False), to.scatter_reduce(
        0, at, x, "amax", include_self=False
    )
