"""Local window attention: what CLEAR does to attention (arXiv 2412.16112, section 3).

An image query at (t, y, x) sees every token that is not of the image and the image keys within its window:
dy^2 + dx^2 < r^2 (circle) or |dy| < r and |dx| < r (square), both strict, and |dt| <= temporal radius, which is ours
(CLEAR is for images). All other queries see everything. Softmax and scale stay as they are, after RoPE.

With a down factor, image queries also see the pooled keys of _pooled_keys.py, wherever those are; other queries do not.
Both parts are computed apart and joined by their log-sum-exps: out = (e^l out + e^l' out') / (e^l + e^l').
A proportional scale is scale sqrt(ln N' / ln base), N' = N keys, or 10 N beside pooled keys, as CLEAR's code has it.

The image tokens are reordered so that a block of them is a compact patch; the list of a query block names exactly the
key blocks that hold a pair within the window, and the element rule is applied only where a block pair is partly inside.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ...archs import Layout
from ...kernels._triton import gathers
from ...kernels.attention.block_sparse import block_sparse
from ...kernels.attention.gather import Chunk, Lists, Rule
from ...kernels.attention.reorder import compact_order, coordinates, inverse
from ._block_map import block_map, lists
from ._gathered import default_block, gathered
from ._pooled_keys import pool, pooled_bias, sizes
from .call import Answer, AttentionCall, Decline
from .picture import WHOLE_BLOCKS, Picture, rule_shares

METRICS = ("circle", "square")
COUNTS = ("auto", "one", "all")  # what a pooled key counts as; auto: one with trained patch weights, else all tokens
BASE_TOKENS = 4608  # CLEAR's training length: 64 x 64 image tokens and 512 of text


@dataclass(frozen=True)
class Window:
    """radius in tokens >= 1, temporal_radius in frames >= 0 (0: the same frame)."""

    radius: int
    metric: str = "circle"
    temporal_radius: int = 0

    def __post_init__(self):
        if self.metric not in METRICS:
            raise ValueError(f"Unknown window metric {self.metric!r}. Use circle or square.")
        if self.radius < 1 or self.temporal_radius < 0:
            raise ValueError(
                f"A window needs radius >= 1 and temporal radius >= 0, got {self.radius} and {self.temporal_radius}."
            )

    def inside(self, dt: torch.Tensor, dy: torch.Tensor, dx: torch.Tensor) -> torch.Tensor:
        """Distances >= 0 along each axis -> bool."""
        if self.metric == "circle":
            near = dy * dy + dx * dx < self.radius**2
        else:
            near = (dy < self.radius) & (dx < self.radius)
        return near & (dt <= self.temporal_radius)

    def spans(self, grid: tuple[int, int, int]) -> bool:
        """Whether every image token sees the whole grid."""
        return bool(self.inside(*(torch.tensor(n - 1) for n in grid)))

    def pairs(self, grid: tuple[int, int, int]) -> int:
        """Image pairs (query, key) within the window, borders counted."""
        t, h, w = (torch.arange(1 - n, n) for n in grid)
        near = self.inside(torch.tensor(0), h.abs()[:, None], w.abs()[None, :])
        space = (near * (grid[1] - h.abs())[:, None] * (grid[2] - w.abs())[None, :]).sum()
        time = ((t.abs() <= self.temporal_radius) * (grid[0] - t.abs())).sum()
        return int(space * time)


@dataclass(frozen=True, eq=False)
class WindowPlan:
    """Lists for one layout. Tokens in `order`: the image's compact, then all others. dense: the window spans the grid,
    and no list is made."""

    layout: Layout
    window: Window
    block: tuple[int, int]  # (queries, keys) of a block, tokens
    dense: bool  # the window spans the grid
    pairs: int  # element pairs that the window allows
    block_pairs: int = 0  # listed
    dense_block_pairs: int = 0
    computed: int = 0  # element pairs of the listed block pairs, and of pooled keys
    down_factor: int = 0  # side of a pooled patch; 0: no pooled keys
    order: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    back: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    coords: torch.Tensor = field(default_factory=lambda: torch.empty(0, 3, dtype=torch.int32))  # t = -1: no image token
    idx: torch.Tensor = field(default_factory=lambda: torch.empty(1, 1, 0, 0, dtype=torch.int32))
    cnt: torch.Tensor = field(default_factory=lambda: torch.empty(1, 1, 0, dtype=torch.int32))
    mode: torch.Tensor = field(default_factory=lambda: torch.empty(1, 1, 0, 0, dtype=torch.int8))
    counts: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # fp32 [P], tokens of each patch
    held: dict[int, list[Chunk]] = field(default_factory=dict, init=False)  # by bytes of a token

    @property
    def dense_pairs(self) -> int:
        return self.layout.total**2

    @property
    def every_pooled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Lists of all pooled keys for the image's queries, as block_sparse takes them: idx, cnt."""
        image = self.layout.total - self.layout.others
        rows, cols = -(-image // self.block[0]), -(-len(self.counts) // self.block[1])
        idx = torch.arange(cols, dtype=torch.int32, device=self.counts.device).expand(1, 1, rows, cols)
        return idx.contiguous(), torch.full((1, 1, rows), cols, dtype=torch.int32, device=self.counts.device)


def build(
    layout: Layout,
    radius: int,
    metric: str = "circle",
    temporal_radius: int = 0,
    block: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    down_factor: int = 0,
) -> WindowPlan:
    """The plan of one layout: made on the CPU, then moved to `device`. down_factor 0 or 1: no pooled keys. ValueError
    for a window that is none."""
    device = torch.device(device)
    window = Window(radius, metric, temporal_radius)
    block = block or default_block(device, layout.total)
    whole = down_factor >= max(layout.grid[1:])  # the mean of a whole frame is no picture of the distance
    down_factor = 0 if down_factor < 2 or whole else down_factor
    counts = sizes(layout.grid, down_factor) if down_factor else torch.empty(0)
    total, image = layout.total, layout.image.stop - layout.image.start
    pairs = total**2 - image**2 + window.pairs(layout.grid) + image * len(counts)
    if window.spans(layout.grid):  # pooled keys would repeat what every token sees
        return WindowPlan(layout, window, block, True, pairs, computed=total**2)
    reach = (1 / (2 * temporal_radius + 1), 1 / (2 * radius), 1 / (2 * radius))
    compact = compact_order(layout.grid, block, reach)
    others = torch.cat([torch.arange(layout.image.start), torch.arange(layout.image.stop, total)])
    order = torch.cat([compact + layout.image.start, others])
    coords = torch.full((total, 3), -1, dtype=torch.int32)
    coords[:image] = coordinates(layout.grid)[compact].int()
    listed, whole = block_map(coords, window.inside, block)
    idx, cnt, mode = lists(listed, whole)
    lengths = [torch.full((n,), size) for n, size in zip(listed.shape, block, strict=True)]
    for length, size in zip(lengths, block, strict=True):
        length[-1] = total - (len(length) - 1) * size
    computed = int((listed * lengths[0][:, None] * lengths[1][None, :]).sum()) + image * len(counts)
    made = {"order": order, "back": inverse(order), "coords": coords, "idx": idx, "cnt": cnt, "mode": mode}
    tensors = {name: x.to(device) for name, x in (made | {"counts": counts}).items()}
    sums = int(listed.sum()), listed.numel(), computed, down_factor
    return WindowPlan(layout, window, block, False, pairs, *sums, **tensors)


def places(layout: Layout) -> torch.Tensor:
    """int32 [N, 3]: (t, y, x) of every token in sequence order, t = -1 where it is not of the image."""
    coords = torch.full((layout.total, 3), -1, dtype=torch.int32)
    coords[layout.image] = coordinates(layout.grid).int()
    return coords


@dataclass(frozen=True)
class Pooling:
    """How the keys of a plan with a down factor are pooled: `weight` [f, f] of the places in a patch, None: their mean;
    `every`: a pooled key counts as all its tokens."""

    weight: torch.Tensor | None = None
    every: bool = False


def attend(
    plan: WindowPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
    pooling: Pooling = Pooling(),
) -> torch.Tensor:
    """q [B, H, N, D]; k, v [B, Hkv, N, D], any strides, N = plan.layout.total; key_bias fp32 [B, N] or None, added to
    the logits. -> [B, H, N, D]. ValueError when the token count is another."""
    total = plan.layout.total
    if q.shape[2] != total or k.shape[2] != total:
        raise ValueError(f"This window plan is for {total} tokens, got {q.shape[2]} queries and {k.shape[2]} keys.")
    if plan.dense:
        return _dense(q, k, v, key_bias, scale)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    out, lse = (_gathered if gathers(q.device) else _launched)(plan, q, k, v, scale, key_bias)
    if plan.down_factor:
        image = plan.layout.image
        far, level = _pooled(plan, q[:, :, image], k[:, :, image], v[:, :, image], scale, key_bias, pooling)
        share = (level - lse[:, :, image]).nan_to_num(nan=-math.inf).sigmoid()  # nan: neither part sees anything
        out[:, :, image].lerp_(far, share[..., None].to(out.dtype))
    return out


def _dense(q, k, v, key_bias: torch.Tensor | None, scale: float | None) -> torch.Tensor:
    bias = None if key_bias is None else key_bias[:, None, None, :].to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _pooled(plan: WindowPlan, q, k, v, scale: float, key_bias: torch.Tensor | None, pooling: Pooling):
    """The image's queries [B, H, n, D] over its pooled keys -> out like q, log-sum-exp [B, H, n]."""
    patches = plan.layout.grid, plan.down_factor, plan.counts
    shares = None if key_bias is None else key_bias[:, plan.layout.image].float().exp()
    k, v = (pool(x, *patches, pooling.weight, shares) for x in (k, v))
    even = shares is None and plan.layout.grid[1] % plan.down_factor == plan.layout.grid[2] % plan.down_factor == 0
    weight = None if even else pooled_bias(shares, *patches, pooling.every)
    lists = *plan.every_pooled, None, None, None, weight
    out, lse = block_sparse(q, k, v, *lists, "none", 0, 0, scale, *plan.block)
    return out, lse + 2 * math.log(plan.down_factor) if even and pooling.every else lse


def _launched(plan: WindowPlan, q, k, v, scale: float, key_bias: torch.Tensor | None):
    """The kernel's path: permuted copies."""
    q, k, v = (x.index_select(2, plan.order) for x in (q, k, v))
    weight = None if key_bias is None else key_bias.float().index_select(-1, plan.order)
    lists = plan.idx, plan.cnt, plan.mode, plan.coords, plan.coords, weight
    numbers = plan.window.metric, plan.window.radius, plan.window.temporal_radius, scale, *plan.block
    out, lse = block_sparse(q, k, v, *lists, *numbers)
    return out.index_select(2, plan.back), lse.index_select(2, plan.back) if plan.down_factor else lse


def _gathered(plan: WindowPlan, q, k, v, scale: float, key_bias: torch.Tensor | None):
    window, total = plan.window, plan.layout.total
    rule = Rule(window.metric, plan.coords, plan.coords, window.radius, window.temporal_radius)
    lists = Lists(plan.idx[0, 0], plan.cnt[0, 0], plan.mode[0, 0], rule, (total, total), plan.block)
    return gathered(plan.held, lists, plan.order, plan.computed, q, k, v, scale, key_bias)


@dataclass(frozen=True)
class LocalWindow:
    """The method as the dispatcher sees it; window settings as in Window. down_factor: side of a pooled patch, 0: none;
    counts_as: one of COUNTS. Plans are kept for one run, by layout and device."""

    radius: int = 16
    metric: str = "circle"
    temporal_radius: int = 0
    down_factor: int = 0
    counts_as: str = "auto"
    proportional: bool = False
    base_tokens: int = BASE_TOKENS
    spatial: ClassVar[bool] = True  # means nothing where tokens have no places

    def begin(self) -> dict[Any, Any]:
        return {}

    def scale_factor(self, tokens: int) -> float:
        """What the softmax scale is multiplied by for that many keys."""
        if not self.proportional:
            return 1.0
        return math.sqrt(math.log(max(2, tokens * (10 if self.down_factor > 1 else 1)), self.base_tokens))

    def attend(self, state: dict[Any, Any], call: AttentionCall) -> Answer:
        q, layout = call.q, call.places()
        bias = call.served_bias()
        key = layout.grid, layout.image.start, layout.total, q.device
        if key not in state:
            window = self.radius, self.metric, self.temporal_radius
            state[key] = build(layout, *window, device=q.device, down_factor=self.down_factor)
        plan, factor = state[key], self.scale_factor(layout.total)
        if plan.dense and factor == 1:
            raise Decline("the window spans the picture")
        rows = q.shape[0] * q.shape[1]
        weight = self._patch_weight(state, call)
        every = self.counts_as == "all" or (self.counts_as == "auto" and weight is None)
        out = attend(plan, q, call.k, call.v, call.scale * factor, bias, Pooling(weight, every))
        return Answer(out, rows * plan.computed, rows * plan.dense_pairs, lambda: self.picture(layout))

    def picture(self, layout: Layout) -> Picture:
        window = Window(self.radius, self.metric, self.temporal_radius)
        note = WHOLE_BLOCKS
        if self.down_factor > 1:
            note += " Pooled keys, which every image query sees besides, are not drawn."
        return Picture(lambda: rule_shares(places(layout), window.inside), note=note)

    def _patch_weight(self, state: dict[Any, Any], call: AttentionCall) -> torch.Tensor | None:
        """What loaded CLEAR weights say about this block's patches, fp32 [f, f], if anything."""
        if self.down_factor < 2:
            return None
        block, device = call.block.number, call.q.device
        if ("patch weight", block, device) not in state:
            held = [getattr(f, "patch_weights", {}) for f in getattr(call.forward.run, "features", ())]
            found = next((w[block] for w in reversed(held) if block in w), None)
            state["patch weight", block, device] = None if found is None else found.to(device, torch.float32)
        return state["patch weight", block, device]
