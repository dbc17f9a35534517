"""Log-linear sparse attention on a model's own weights (LLSA, arXiv 2512.16615, section 3).

The image tokens are brought into an order in which every aligned run of `block` tokens is a compact patch. Then image
queries see a few patches token by token and the rest of the picture as means, as kernels/attention/
hierarchical_sparse.py defines it. Text and every other token stay dense, both ways: they see everything, and every
image query sees all of them. Its two softmaxes, over the picture and over the text, become one by their log-sum-exps
l and m:

    out = (e^l out_image + e^m out_text) / (e^l + e^m)

Without text this is the paper's attention; without `enrich` and with all patches chosen it is dense attention, and so
it is with `exclude_selected`. Keeping the text dense and the share of patches (`density`) are ours.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ...archs import Grid, Layout
from ...kernels.attention._hierarchical_lists import Pyramid
from ...kernels.attention.block_sparse import block_sparse, full_lists
from ...kernels.attention.gather import like
from ...kernels.attention.hierarchical_sparse import default_levels, keys_seen, log_linear_attention, pooled
from ...kernels.attention.reorder import compact_order, inverse, zorder
from ...kernels.attention.topk import hierarchical
from .call import Answer, AttentionCall, Decline
from .picture import AS_GIVEN, PATCHES, Picture, listed_shares

ORDERS = ("auto", "tile3d", "tile2d", "zorder", "none")
TEXT_BLOCK = 64  # tokens, of the lists of the text part
SELECTION_BYTES = 512 << 20  # of the scores by which patches are chosen; more heads take further passes


def image_order(grid: Grid, reorder: str, block: int) -> torch.Tensor | None:
    """int64 [T * H * W]: position in the order -> row-major token; None: as it is. tile2d keeps frames apart as far as
    whole patches go, tile3d cuts patches through time too; auto is none on a picture whose rows fit into a patch, else tile3d."""
    if reorder == "auto":
        reorder = "none" if grid[0] == 1 and grid[2] <= block else "tile3d"
    if reorder == "none":
        return None
    if reorder == "zorder":
        return zorder(grid)
    n, runs = math.prod(grid), [block]
    while runs[-1] * block < n:
        runs.append(runs[-1] * block)
    return compact_order(grid, tuple(runs), (float(n) if reorder == "tile2d" else 1.0, 1.0, 1.0))


@dataclass(frozen=True, eq=False)
class SparsePlan:
    """What one layout needs. topk patches of each level are chosen, of nodes[0] on the finest."""

    layout: Layout
    pyramid: Pyramid
    topk: int
    keys: int  # that an image query sees among the image and its means
    order: torch.Tensor | None
    back: torch.Tensor | None
    text: tuple[torch.Tensor, torch.Tensor] | None  # lists of the image queries over all other tokens

    @property
    def image(self) -> int:
        return self.pyramid.tokens

    @property
    def dense_pairs(self) -> int:
        return self.layout.total**2

    @property
    def pairs(self) -> int:
        others = self.layout.others
        return self.image * (self.keys + others) + others * self.layout.total

    def ordered(self, x: torch.Tensor) -> torch.Tensor:
        """The image tokens of x [B, H, N, D] in the plan's order."""
        x = x[:, :, self.layout.image]
        return x if self.order is None else x.index_select(2, self.order)

    def others(self, x: torch.Tensor) -> torch.Tensor:
        """All other tokens of x [B, H, N, D], or of a bias [B, N]."""
        at, axis = self.layout.image, min(2, x.ndim - 1)
        parts = [x.narrow(axis, 0, at.start), x.narrow(axis, at.stop, self.layout.total - at.stop)]
        held = [part for part in parts if part.shape[axis]]
        return held[0] if len(held) == 1 else torch.cat(held, axis)


@dataclass
class SparseState:
    """Of one run: plans by layout and device, and what was found out about the last mask."""

    plans: dict[Any, SparsePlan] = field(default_factory=dict)
    mask: torch.Tensor | None = None  # held, so that its address stays its own
    forward: Any = None  # the call of the model that it was met in
    bias: torch.Tensor | None = None
    refused: str = ""


@dataclass(frozen=True)
class LogLinearSparse:
    """density: share of the patches that are chosen, 0 to 1; topk: so many instead, where not 0. levels 0: as many as
    the paper takes for the size. block: tokens of a patch, a multiple of 16."""

    density: float = 0.25
    topk: int = 0
    levels: int = 0
    block: int = 16
    enrich: bool = True
    reweight: bool = True
    exclude_selected: bool = False
    reorder: str = "tile3d"
    spatial: ClassVar[bool] = True  # patches mean nothing where tokens have no places

    def __post_init__(self):
        if self.reorder not in ORDERS:
            raise ValueError(f"Unknown order {self.reorder!r}. Use one of {', '.join(ORDERS)}.")
        if not 0 <= self.density <= 1 or self.topk < 0 or not 0 <= self.levels <= 3:
            raise ValueError(
                f"Log-linear attention needs a density of 0 to 1, topk of at least 0 and 0 to 3 levels, got "
                f"{self.density}, {self.topk} and {self.levels}."
            )
        if self.block < 16 or self.block % 16:
            raise ValueError(f"Patches must hold a multiple of 16 tokens, got {self.block}.")

    def begin(self) -> SparseState:
        return SparseState()

    def plan(self, layout: Layout, device: torch.device | str = "cpu") -> SparsePlan:
        """Made on the CPU, then moved."""
        n = layout.image.stop - layout.image.start
        pyramid = Pyramid(n, self.block, self.levels or default_levels(n, self.block))
        topk = min(pyramid.sizes[1], self.topk or max(1, math.ceil(self.density * pyramid.sizes[1])))
        while not self.levels and pyramid.levels > 1 and topk >= pyramid.sizes[-1]:
            pyramid = Pyramid(n, self.block, pyramid.levels - 1)  # a level that is chosen whole tells nothing apart
        order = image_order(layout.grid, self.reorder, self.block)
        back = None if order is None else inverse(order).to(device)
        text = None
        if layout.others:
            text = full_lists(-(-n // TEXT_BLOCK), -(-layout.others // TEXT_BLOCK), device)
        keys = keys_seen(pyramid, topk, self.enrich, self.exclude_selected)
        return SparsePlan(layout, pyramid, topk, keys, None if order is None else order.to(device), back, text)

    def attend(self, state: SparseState, call: AttentionCall) -> Answer:
        q, layout = call.q, call.places()
        key = layout.grid, layout.image.start, layout.total, q.device
        if key not in state.plans:
            state.plans[key] = self.plan(layout, q.device)
        plan = state.plans[key]
        if plan.topk >= plan.pyramid.sizes[1]:
            raise Decline("every patch is chosen")
        if plan.pairs >= plan.dense_pairs:
            raise Decline("it would compute as many pairs as dense attention")
        bias = _key_bias(state, call)
        rows = q.shape[0] * q.shape[1]
        out = self.compute(plan, q, call.k, call.v, call.scale, bias)
        picture = lambda: self.picture(plan, q[:1, :1], call.k[:1, :1])  # noqa: E731
        return Answer(out, rows * plan.pairs, rows * plan.dense_pairs, picture)

    def picture(self, plan: SparsePlan, q: torch.Tensor, k: torch.Tensor) -> Picture:
        """q, k [1, 1, N, D]: chooses their patches once more."""
        pyramid, (n, others) = plan.pyramid, (plan.pyramid.sizes[1], plan.layout.others)
        idx, cnt = hierarchical(*(pooled(plan.ordered(x), pyramid) for x in (q, k)), self.block, plan.topk)
        at = pyramid.at(1)
        held = torch.arange(idx.shape[3], device=q.device) < cnt[0, 0, at, None]
        to = idx[0, 0, at].long().masked_fill(~held, n)
        listed = torch.zeros(n, n + 1, device=q.device).scatter_(1, to, 1.0)[:, :n]
        order = PATCHES if plan.order is not None else "image tokens, then all others" if others else AS_GIVEN
        note = "Means of patches, which every image query sees besides, are not drawn." if self.enrich else ""
        return Picture(listed_shares(listed, plan.image, others, (self.block, self.block)), "head 0", order, note)

    def compute(
        self,
        plan: SparsePlan,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """q [B, H, N, D]; k, v [B, Hkv, N, D], any strides; bias fp32 [B, N], 0 at image keys -> [B, H, N, D]."""
        out, at = like(q), plan.layout.image
        text_bias = None if bias is None or plan.text is None else plan.others(bias).contiguous()
        for mine, own in _passes(plan, q.shape, k.shape):
            qs, ks, vs = (plan.ordered(x) for x in (q[:, mine], k[:, own], v[:, own]))
            options = scale, self.enrich, self.reweight, self.exclude_selected
            got, level, _ = log_linear_attention(qs, ks, vs, plan.topk, self.block, plan.pyramid.levels, *options)
            if plan.text is not None:
                keys, values = plan.others(k[:, own]), plan.others(v[:, own])
                lists = *plan.text, None, None, None, text_bias
                read = block_sparse(qs, keys, values, *lists, scale=scale, block_m=TEXT_BLOCK, block_n=TEXT_BLOCK)
                got = joined(got, level, *read)
            out[:, mine, at] = got if plan.back is None else got.index_select(2, plan.back)
        if plan.text is not None:
            mask = None if bias is None else bias[:, None, None].to(q.dtype)
            rows = F.scaled_dot_product_attention(
                plan.others(q), k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            out[:, :, : at.start], out[:, :, at.stop :] = rows[:, :, : at.start], rows[:, :, at.start :]
        return out


def joined(out: torch.Tensor, level: torch.Tensor, other: torch.Tensor, other_level: torch.Tensor) -> torch.Tensor:
    """One softmax out of two over different keys: out, other [B, H, N, D] and their log-sum-exps [B, H, N]. Formed in
    the dtype of these. other_level may be -inf: nothing was seen there."""
    share = (other_level - torch.logaddexp(level, other_level)).exp_()
    return out.to(level.dtype).lerp(other.to(level.dtype), share[..., None]).to(out.dtype)


def _passes(plan: SparsePlan, q: torch.Size, k: torch.Size) -> Iterator[tuple[slice, slice]]:
    """(query heads, their key heads) whose patches are chosen at once."""
    group, (heads, nodes) = q[1] // k[1], (k[1], plan.pyramid.sizes)
    seen = nodes[1] if plan.pyramid.levels == 1 else min(nodes[1], plan.topk * plan.pyramid.block)
    step = max(1, SELECTION_BYTES // (4 * q[0] * group * nodes[1] * seen))
    for start in range(0, heads, step):
        own = slice(start, min(start + step, heads))
        yield slice(own.start * group, own.stop * group), own


def _key_bias(state: SparseState, call: AttentionCall) -> torch.Tensor | None:
    """The mask as a bias over keys [B, N]. Declines where it hides image tokens or differs between queries; looks at the
    values of a mask once in a call of the model, not at each block."""
    mask = call.mask
    if mask is None:
        return None
    known = state.forward is call.forward and state.mask is not None and _place(state.mask) == _place(mask)
    if not known or (state.bias is not None and state.bias.shape[0] != call.q.shape[0]):
        state.mask, state.bias, state.refused, state.forward = mask, None, "", call.forward
        try:
            state.bias = bias = call.key_bias()
        except ValueError as reason:
            state.refused = str(reason)
        else:
            if bias is not None and call.layout is not None and bool((bias[:, call.layout.image] != 0).any()):
                state.refused = "the mask hides or weighs image tokens"
    if state.refused:
        raise Decline(state.refused)
    return state.bias


def _place(x: torch.Tensor) -> tuple[Any, ...]:
    """What tells a view of memory from another, as long as one of them is held."""
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.device
