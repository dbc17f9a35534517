"""Static patterns of a given density, and attention over the pairs that they leave: made once for a layout, from its
grid alone, as block lists with an element rule. Tokens that are not of the image see all and are seen by all."""

from dataclasses import dataclass, field

import torch

from ...archs import Layout
from ...kernels._triton import gathers
from ...kernels.attention.block_sparse import block_sparse, full_lists
from ...kernels.attention.dual_softmax import dual_softmax
from ...kernels.attention.gather import Chunk, Lists, Rule
from ...kernels.attention.reorder import compact_order, coordinates, inverse
from ._block_map import Inside, block_map, lists
from ._gathered import default_block, gathered
from .picture import rule_shares

FRAMES_LAST = (1e-6, 1.0, 1.0)  # where the pattern is the same in all frames, a block is a few places of many frames
PATTERNS = ("band_per_frame", "band", "circle", "frame_tile")


@dataclass(frozen=True, eq=False)
class StaticPlan:
    """Lists for one layout, in `order`. dense: every pair is left, and no list is made."""

    layout: Layout
    rule: str
    radius: int
    temporal_radius: int
    block: tuple[int, int]  # (queries, keys) of a block, tokens
    dense: bool
    computed: int  # element pairs of the listed block pairs
    partly: int  # of them in block pairs where the rule decides
    order: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    back: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    coords: torch.Tensor = field(default_factory=lambda: torch.empty(0, 3, dtype=torch.int32))  # t = -1: sees all
    idx: torch.Tensor = field(default_factory=lambda: torch.empty(1, 1, 0, 0, dtype=torch.int32))
    cnt: torch.Tensor = field(default_factory=lambda: torch.empty(1, 1, 0, dtype=torch.int32))
    mode: torch.Tensor = field(default_factory=lambda: torch.empty(1, 1, 0, 0, dtype=torch.int8))
    held: dict[int, list[Chunk]] = field(default_factory=dict, init=False)  # by bytes of a token

    @property
    def dense_pairs(self) -> int:
        return self.layout.total**2

    def numbers(self, scale: float) -> tuple:
        return self.rule, self.radius, self.temporal_radius, scale, *self.block


def places(pattern: str, grid: tuple[int, int, int], density: float) -> tuple[torch.Tensor, str, int, int]:
    """The pattern as an element rule of block_sparse on places: int32 [T H W, 3] of the tokens in row-major order
    (-1: sees all), rule, radius, temporal radius. ValueError for an unknown pattern."""
    frames, height, width = grid
    at, area = coordinates(grid).int(), height * width
    if pattern == "circle":  # a disc of the share `density` of a frame, in every frame; at least the token itself
        return at, "circle", disc_radius(round(area * density)), frames
    along = torch.stack([at[:, 0], torch.zeros_like(at[:, 0]), at[:, 1] * width + at[:, 2]], 1)
    if pattern == "band_per_frame":
        return along, "band", int(area * density) // 2, frames
    if pattern == "band":
        along[:, 2] += along[:, 0] * area
        along[:, 0] = 0
        return along, "band", int(frames * area * density) // 2, 0
    if pattern == "frame_tile":  # its own frame, and evenly spread frames that all see and that see all
        references = min(frames, max(0, round(frames * density) - 1))
        chosen = (torch.arange(references) * frames // max(1, references)).int()
        along[torch.isin(along[:, 0], chosen)] = -1
        return along, "band", area, 0
    raise ValueError(f"Unknown pattern {pattern!r}. Use one of {', '.join(PATTERNS)}.")


def disc_radius(tokens: int) -> int:
    """The largest r >= 1 such that a disc dy^2 + dx^2 < r^2 holds at most so many tokens; 1, the token alone, at least."""
    radius = 1
    while True:
        y, x = torch.meshgrid(torch.arange(-radius, radius + 1), torch.arange(-radius, radius + 1), indexing="ij")
        if int((y * y + x * x < (radius + 1) ** 2).sum()) > tokens:
            return radius
        radius += 1


def build(
    layout: Layout,
    pattern: str,
    density: float,
    block: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
) -> StaticPlan:
    """The plan of one layout: made on the CPU, then moved to `device`. density: share of the image keys that an image
    query sees, 1 all."""
    device = torch.device(device)
    block = block or default_block(device, layout.total)
    total, image = layout.total, layout.image
    at, rule, radius, reach = places(pattern, layout.grid, density)
    coords = torch.full((total, 3), -1, dtype=torch.int32)
    coords[image] = at
    whole_grid = layout, rule, radius, reach, block, True, total**2, 0
    if density >= 1 or bool((at < 0).all()):
        return StaticPlan(*whole_grid)
    order = _order(layout, pattern, coords, block)
    coords = coords[order]
    some, whole = block_map(coords, _inside(rule, radius, reach), block)
    if bool(whole.all()):
        return StaticPlan(*whole_grid)
    lengths = [torch.full((n,), size) for n, size in zip(some.shape, block, strict=True)]
    for length, size in zip(lengths, block, strict=True):
        length[-1] = total - (len(length) - 1) * size
    area = lengths[0][:, None] * lengths[1][None, :]
    idx, cnt, mode = lists(some, whole)
    tensors = (x.to(device) for x in (order, inverse(order), coords, idx, cnt, mode))
    counts = int((some * area).sum()), int(((some & ~whole) * area).sum())
    return StaticPlan(layout, rule, radius, reach, block, False, *counts, *tensors)


def _inside(rule: str, radius: int, reach: int) -> Inside:
    def inside(dt: torch.Tensor, dy: torch.Tensor, dx: torch.Tensor) -> torch.Tensor:
        near = dy * dy + dx * dx < radius**2 if rule == "circle" else dx <= radius
        return near & (dt <= reach)

    return inside


def shares(layout: Layout, pattern: str, density: float) -> torch.Tensor:
    """The pattern as a picture [R, C], tokens in sequence order."""
    coords = torch.full((layout.total, 3), -1, dtype=torch.int32)
    coords[layout.image], rule, radius, reach = places(pattern, layout.grid, density)
    return rule_shares(coords, _inside(rule, radius, reach))


def _order(layout: Layout, pattern: str, coords: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """int64 [N]: compact blocks for patterns with more than one axis, then what sees all; else the sequence as it is."""
    t, h, w = layout.grid
    image, number = layout.image, torch.arange(layout.total)
    if pattern == "circle":
        compact = compact_order(layout.grid, block, FRAMES_LAST)
    elif pattern == "band_per_frame" and t > 1:
        compact = compact_order((t, 1, h * w), block, FRAMES_LAST)
    else:
        free = coords[:, 0] < 0
        return torch.cat([number[~free], number[free]])
    return torch.cat([compact + image.start, number[: image.start], number[image.stop :]])


def refresh(plan: StaticPlan, q, k, v, scale: float, key_bias: torch.Tensor | None):
    """Dense attention, and attention over the pattern, in one pass where no bias is added: out_full, lse_full, out,
    lse, rows in sequence order. q [B, H, N, D], k, v [B, Hkv, N, D], key_bias fp32 [B, N] or None."""
    q, k, v = (x.index_select(2, plan.order) for x in (q, k, v))
    listed = plan.idx, plan.cnt, plan.mode, plan.coords, plan.coords
    if key_bias is None:
        both = dual_softmax(q, k, v, *listed, *plan.numbers(scale))
    else:
        bias = key_bias.float().index_select(-1, plan.order)
        numbers = "none", 0, 0, scale, *plan.block
        every = full_lists(*(-(-plan.layout.total // size) for size in plan.block), q.device)
        full = block_sparse(q, k, v, *every, None, None, None, bias, *numbers)
        both = *full, *block_sparse(q, k, v, *listed, bias, *plan.numbers(scale))
    return tuple(x.index_select(2, plan.back) for x in both)


def listed(
    plan: StaticPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    key_bias: torch.Tensor | None,
    factor: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over the pattern alone, times factor [B, H, N] plus residual [B, H, N, D], both in sequence order."""
    if gathers(q.device):
        out = _gathered(plan, q, k, v, scale, key_bias)
        wide = out.to(torch.promote_types(out.dtype, torch.float32))
        wide = wide if factor is None else wide.mul_(factor[..., None])
        return (wide if residual is None else wide.add_(residual)).to(out.dtype)
    rows = (None if x is None else x.index_select(2, plan.order) for x in (factor, residual))
    q, k, v = (x.index_select(2, plan.order) for x in (q, k, v))
    bias = None if key_bias is None else key_bias.float().index_select(-1, plan.order)
    lists = plan.idx, plan.cnt, plan.mode, plan.coords, plan.coords, bias
    return block_sparse(q, k, v, *lists, *plan.numbers(scale), None, None, *rows)[0].index_select(2, plan.back)


def _gathered(plan: StaticPlan, q, k, v, scale: float, key_bias: torch.Tensor | None) -> torch.Tensor:
    rule, total = Rule(plan.rule, plan.coords, plan.coords, plan.radius, plan.temporal_radius), plan.layout.total
    named = Lists(plan.idx[0, 0], plan.cnt[0, 0], plan.mode[0, 0], rule, (total, total), plan.block)
    return gathered(plan.held, named, plan.order, plan.computed, q, k, v, scale, key_bias)[0]
