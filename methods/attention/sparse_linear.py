"""Sparse-Linear Attention (SLA, arXiv 2509.24006): softmax over the key blocks that matter, linear attention for the rest.

For each block of image queries the key blocks are ranked by the products of block means. The best topk of them are
attended to exactly, O_s. What they leave is approximated by linear attention, O_l, and a projection learnt per
transformer block: O = O_s + O_l W^T + b. Three forms of O_l exist:

    main    over all keys, with 1e-5 in the denominator (the official code, TurboDiffusion)
    sla1    over the keys of the blocks that are not listed (the official branch SLA-1)
    paper   as sla1, without a share of blocks of the lowest scores, which are negligible

Without W the linear branch is off: a projection starts at zero, so that O_s alone is what an untrained SLA gives. Rows
and columns of tokens that are not of the image stay dense. Compact blocks of image tokens, and keeping each query
block's own key block, are ours.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ...archs import Grid, Layout
from ...kernels.attention.block_sparse import block_sparse
from ...kernels.attention.pool import pool
from ...kernels.attention.reorder import compact_order, inverse
from ...kernels.attention.topk import topk
from ._linear_branch import FEATURE_MAPS, linear_all, linear_rest
from .call import Answer, AttentionCall, Decline
from .picture import AS_GIVEN, PATCHES, Picture, listed_shares
from .sparse_linear_weights import Projections

VARIANTS = ("main", "sla1", "paper")
ORDERS = ("auto", "tiles", "rows")


def auto_block(image: int) -> int:
    """Tokens of a block for a picture of so many: so that there are about 64 to choose from, 16 to 64. On the digit models
    (256 tokens) blocks of 16 keep twice as much of the plain picture as blocks of 64."""
    return min(64, max(16, 1 << math.ceil(math.log2(max(1, image / 64)))))


def auto_order(grid: Grid, block: int) -> str:
    """A block that holds a row of the grid or more is compact as it stands; in wider grids tiles are."""
    return "rows" if grid[2] <= block else "tiles"


@dataclass(frozen=True)
class BlockPlan:
    """The blocks of one layout. Tokens in `order`: the image's, then all others. Key blocks 0..ranked-1 hold image
    tokens alone and are chosen from, the later ones are always listed."""

    layout: Layout
    image: int  # image tokens
    block: tuple[int, int]  # (queries, keys) of a block, tokens
    ranked: int  # key blocks to choose from
    keep: int  # of which each query block lists so many
    tiles: bool  # image tokens are in compact patches
    order: torch.Tensor | None  # int64 [total]; None: as the tokens stand
    back: torch.Tensor | None  # int64 [image], the place of each image token in the order; None: as they stand
    others: torch.Tensor  # int64 [total - image], tokens that are not of the image
    always: torch.Tensor  # int32 [A], key blocks behind the ranked ones
    own: torch.Tensor  # bool [nQ, ranked], blocks that share a token

    @property
    def dense(self) -> bool:
        return self.keep >= self.ranked

    @property
    def computed(self) -> float:
        """Pairs of one head; the tail block counts as often as any other would be chosen."""
        ranked = min(self.ranked * self.block[1], self.image)
        seen = self.keep / self.ranked * ranked + self.layout.total - ranked if self.ranked else self.layout.total
        return self.image * seen + (self.layout.total - self.image) * self.layout.total


def build(
    layout: Layout, topk: float, block: tuple[int, int] = (64, 64), order: str = "tiles",
    device: torch.device | str = "cpu",
) -> BlockPlan:  # fmt: skip
    """The plan of one layout: made on the CPU, then moved to `device`. topk: share of the key blocks, at least one."""
    total, start, stop = layout.total, layout.image.start, layout.image.stop
    image, (bq, bk) = stop - start, block
    order = auto_order(layout.grid, bk) if order == "auto" else order
    places = compact_order(layout.grid, block) if order == "tiles" else torch.arange(image)
    others = torch.cat([torch.arange(start), torch.arange(stop, total)])
    sequence = torch.cat([places + start, others])
    # with others in the sequence a ragged tail shares its key block with them, and is always listed
    ranked = image // bk if len(others) else -(-image // bk)
    keep = min(ranked, max(1, int(topk * ranked)))
    first = torch.arange(-(-image // bq))[:, None] * bq
    column = torch.arange(ranked)[None, :] * bk
    own = (column < first + bq) & (column + bk > first)
    always = torch.arange(ranked, -(-total // bk), dtype=torch.int32)
    same = order != "tiles" and start == 0
    tensors = (None if x is None else x.to(device) for x in (
        None if same else sequence, None if same else inverse(places), others, always, own))  # fmt: skip
    return BlockPlan(layout, image, block, ranked, keep, order == "tiles", *tensors)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Blocks:
    """What one call lists. idx int32 [B, H, nQ, W] and cnt [B, H, nQ] over all key blocks; rest: bool [B, H, nQ, ranked],
    blocks left to the linear branch, None where it does not ask."""

    idx: torch.Tensor
    cnt: torch.Tensor
    rest: torch.Tensor | None


def select(plan: BlockPlan, q: torch.Tensor, k: torch.Tensor, keep_own: bool, negligible: float | None) -> Blocks:
    """q [B, H, image, D], k [B, Hkv, total, D] in the plan's order. negligible: the share of blocks of the lowest scores
    that `rest` leaves out; None: no `rest`."""
    (bq, bk), (b, h), kv = plan.block, q.shape[:2], k.shape[1]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    pooled_q = pool(q, bq, dtype=exact)
    pooled_k = pool(k[:, :, : min(plan.ranked * bk, plan.image)], bk, dtype=exact)
    grouped = pooled_q.unflatten(1, (kv, h // kv)).flatten(2, 3)
    scores = (grouped @ pooled_k.transpose(2, 3)).view(b, h, -1, plan.ranked).nan_to_num()
    ranks = scores.masked_fill(plan.own, torch.inf) if keep_own else scores
    best, _ = topk(ranks, plan.keep)
    listed = torch.cat([best, plan.always.expand(*best.shape[:3], -1)], 3)
    cnt = torch.full(best.shape[:3], listed.shape[3], dtype=torch.int32, device=q.device)
    if negligible is None:
        return Blocks(listed, cnt, None)
    rest = torch.ones(scores.shape, dtype=torch.bool, device=q.device).scatter_(3, best.long(), False)
    dropped = min(plan.ranked - plan.keep, int(negligible * plan.ranked))
    if dropped:
        worst, _ = topk((-scores).masked_fill(~rest, -torch.inf), dropped)
        rest.scatter_(3, worst.long(), False)
    return Blocks(listed, cnt, rest)


@dataclass
class State:
    """Of one run."""

    plans: dict[Any, BlockPlan] = field(default_factory=dict)
    projections: dict[Any, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # by block, device, dtype


@dataclass(frozen=True)
class SparseLinear:
    """The method as the dispatcher sees it. topk: share of key blocks, 0..1; negligible: share of them, for `paper`;
    block_q, block_k: tokens, 0: auto_block; order: `tiles`, compact patches, `rows`, as the tokens stand (the official
    models), or auto_order.
    projections None: the sparse part alone."""

    topk: float = 0.5
    variant: str = "main"
    negligible: float = 0.1
    feature_map: str = "softmax"
    block_q: int = 64
    block_k: int = 64
    keep_own: bool = True
    order: str = "tiles"
    projections: Projections | None = None
    spatial: ClassVar[bool] = True  # means nothing where tokens have no places

    def __post_init__(self):
        for name, choices in (("variant", VARIANTS), ("feature_map", FEATURE_MAPS), ("order", ORDERS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"Unknown {name} {getattr(self, name)!r}. Use one of {', '.join(choices)}.")
        if not 0 < self.topk <= 1 or not 0 <= self.negligible < 1:
            raise ValueError(
                f"Sparse-Linear Attention needs topk above 0 and up to 1 and negligible from 0 to below 1, got "
                f"{self.topk} and {self.negligible}."
            )

    def begin(self) -> State:
        return State()

    def plan(self, state: State, call: AttentionCall) -> BlockPlan:
        """The plan that serves this call; Decline where none does."""
        layout, device = call.places(), call.q.device
        key = layout.grid, layout.image.start, layout.total, device
        if key not in state.plans:
            auto = auto_block(layout.image.stop - layout.image.start)
            block = self.block_q or auto, self.block_k or auto
            state.plans[key] = build(layout, self.topk, block, self.order, device)
        if state.plans[key].dense:
            raise Decline("every block is kept")
        return state.plans[key]

    def attend(self, state: State, call: AttentionCall) -> Answer:
        plan = self.plan(state, call)
        bias = call.served_bias()
        number = call.block.number
        weights = self.projections
        projection = None if weights is None or number not in weights.blocks else _projection(state, weights, call)
        rows = ordered(plan, call, bias)
        blocks = select(plan, rows.q, rows.k, self.keep_own, self.asks if projection is not None else None)
        added = None
        if projection is not None:
            added = F.linear(self.linear(plan, rows, blocks), *projection)
        out = self.sparse(plan, rows, blocks, call.scale, added)
        heads = call.q.shape[0] * call.q.shape[1]
        pairs, dense = heads * plan.computed, heads * float(plan.layout.total**2)
        return Answer(self.placed(plan, call, out, bias), pairs, dense, lambda: self.picture(plan, blocks))

    def picture(self, plan: BlockPlan, blocks: "Blocks") -> Picture:
        """Of the first row of the batch."""
        idx = blocks.idx[0, :, :, : plan.keep].long()
        listed = torch.zeros(*idx.shape[:2], plan.ranked, dtype=torch.bool, device=idx.device).scatter_(2, idx, True)
        shares = listed_shares(listed.float().mean(0), plan.image, len(plan.others), plan.block)
        order = AS_GIVEN if plan.order is None else PATCHES if plan.tiles else "image tokens, then all others"
        return Picture(shares, f"mean of {len(idx)} heads" if len(idx) > 1 else "one head", order)

    @property
    def asks(self) -> float | None:
        """The share of negligible blocks for `select`."""
        return {"main": None, "sla1": 0.0, "paper": self.negligible}[self.variant]

    def sparse(self, plan, rows: "Rows", blocks: Blocks, scale: float, added: torch.Tensor | None = None):
        """O_s [B, H, image, D], in the plan's order; added to it: `added`."""
        lists = blocks.idx, blocks.cnt, None, None, None, rows.weight, "none", 0, 0, scale, *plan.block
        return block_sparse(rows.q, rows.k, rows.v, *lists, residual=added)[0]

    def linear(self, plan, rows: "Rows", blocks: Blocks) -> torch.Tensor:
        """O_l [B, H, image, D], in the plan's order."""
        if self.variant == "main":
            return linear_all(rows.q, rows.k, rows.v, rows.weight, self.feature_map)
        count = min(plan.ranked * plan.block[1], plan.image)
        k, v = rows.k[:, :, :count], rows.v[:, :, :count]
        weight = None if rows.weight is None else rows.weight[:, :count]
        assert blocks.rest is not None
        return linear_rest(rows.q, k, v, weight, blocks.rest, plan.block, self.feature_map)

    def placed(self, plan: BlockPlan, call: AttentionCall, image: torch.Tensor, bias) -> torch.Tensor:
        """The image rows put back where they stood, beside dense rows of all other tokens. [B, H, N, D]."""
        if not len(plan.others):
            return image if plan.back is None else image.index_select(2, plan.back)
        out = torch.empty_like(call.q)
        where = plan.layout.image
        out[:, :, where] = image if plan.back is None else image.index_select(2, plan.back)
        mask = None if bias is None else bias[:, None, None, :].to(call.q.dtype)
        grouped = call.q.shape[1] != call.k.shape[1]
        text = call.q.index_select(2, plan.others)
        dense = F.scaled_dot_product_attention(text, call.k, call.v, mask, scale=call.scale, enable_gqa=grouped)
        return out.index_copy_(2, plan.others, dense)


@dataclass(frozen=True)
class Rows:
    """One call in a plan's order: q [B, H, image, D]; k, v [B, Hkv, total, D]; weight fp32 [B, total] or None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    weight: torch.Tensor | None


def ordered(plan: BlockPlan, call: AttentionCall, bias: torch.Tensor | None) -> Rows:
    if plan.order is None:
        return Rows(call.q[:, :, : plan.image], call.k, call.v, bias)
    weight = None if bias is None else bias.index_select(1, plan.order)
    q, k, v = (x.index_select(2, to) for x, to in (
        (call.q, plan.order[: plan.image]), (call.k, plan.order), (call.v, plan.order)))  # fmt: skip
    return Rows(q, k, v, weight)


def _projection(state: State, weights: Projections, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    number, q = call.block.number, call.q
    key = number, q.device, q.dtype
    if key not in state.projections:
        weight, bias = weights.blocks[number]
        if len(bias) != q.shape[3]:
            raise ValueError(
                f"The projections of {weights.name} are for heads of {len(bias)}, block {number} of this model has heads "
                f"of {q.shape[3]}. Choose weights that were made for this model."
            )
        state.projections[key] = weight.to(q), bias.to(q)
    return state.projections[key]
