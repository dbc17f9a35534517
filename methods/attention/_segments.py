"""Attention within segments: windows, blocks along the diagonal and tiles of frames are one thing. Every token belongs
to one segment or is free: a token sees its segment and the free tokens, which see all and are seen by all.

On a CPU whole segments form the chunks of gather.py: nothing is computed that is not needed, and no mask is made. Where
the tokens of a segment follow each other and none is free, there is no gather either. On a GPU the tokens are ordered
by segment and the block lists name the block pairs that share one.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ...archs import Grid, Layout
from ...kernels._triton import gathers
from ...kernels.attention._dense import multiplies_bfloat16
from ...kernels.attention.block_sparse import block_sparse
from ...kernels.attention.gather import GATHER_BYTES, Chunk, outputs
from ...kernels.attention.gather import attend as attend_chunks
from ...kernels.attention.reorder import inverse
from ._block_map import lists
from .call import Answer, AttentionCall, Decline
from .picture import Picture, segment_shares

FREE = -1
HELD_BYTES = 256 << 20  # token numbers that a plan keeps between calls on a CPU; more are made anew for each call
SCORE_BYTES = 256 << 20  # of a chunk's scores, where they are formed in memory
BLOCKS = ((128, 64), (64, 64))  # (queries, keys) of the GPU kernel; small segments waste less with the second


@dataclass(frozen=True, eq=False)
class SegmentPlan:
    """Tokens in `order`: segment after segment, then the free ones. dense: all see all, and nothing else is made."""

    total: int
    dense: bool
    pairs: int  # element pairs that see each other
    computed: int  # element pairs that are computed
    free: int = 0  # tokens
    block: tuple[int, int] = BLOCKS[0]
    block_pairs: int = 0  # listed; 0 where there are no lists
    dense_block_pairs: int = 0
    moved: bool = False  # whether `order` changes anything
    sizes: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # of the segments, CPU
    order: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    back: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    coords: torch.Tensor = field(default_factory=lambda: torch.empty(0, 3, dtype=torch.int32))  # (segment, 0, 0)
    idx: torch.Tensor = field(default_factory=lambda: torch.empty(1, 1, 0, 0, dtype=torch.int32))
    cnt: torch.Tensor = field(default_factory=lambda: torch.empty(1, 1, 0, dtype=torch.int32))
    mode: torch.Tensor = field(default_factory=lambda: torch.empty(1, 1, 0, 0, dtype=torch.int8))
    held: dict[Any, list[Chunk]] = field(default_factory=dict, init=False)  # by bytes of a token, and the longest piece

    @property
    def dense_pairs(self) -> int:
        return self.total**2


def labels(layout: Layout, image: torch.Tensor, text: str = "dense") -> torch.Tensor:
    """Segments of the image tokens int64 [T * H * W] -> of all tokens [N]. The others are free with text="dense"; with
    "none" they are a segment of their own. FREE stays FREE."""
    own = FREE if text == "dense" else int(image.max()) + 1
    out = torch.full((layout.total,), own, dtype=torch.int64)
    out[layout.image] = image
    return out


def build(label: torch.Tensor, block: tuple[int, int] | None = None, device: torch.device | str = "cpu") -> SegmentPlan:
    """label int64 [N]: segment of each token, any numbers, FREE for those that see all. block: make lists of this size
    whatever the device; by default a CPU needs none."""
    device, total = torch.device(device), len(label)
    kept = label != FREE
    free = int((~kept).sum())
    names, number = label[kept].unique(return_inverse=True)
    if len(names) < 2:
        return SegmentPlan(total, True, total**2, total**2, free)
    sizes = number.bincount()
    pairs = int((sizes * (sizes + free)).sum()) + free * total
    segment = torch.full((total,), len(names), dtype=torch.int64)
    segment[kept] = number
    order = segment.argsort(stable=True)
    moved = bool((order[1:] < order[:-1]).any())
    if block is None and gathers(device):
        return SegmentPlan(total, False, pairs, pairs, free, moved=moved, sizes=sizes, order=order)
    made = [_lists(sizes, free, size) for size in (BLOCKS if block is None else (block,))]
    best = made[-1] if made[-1].computed < 0.75 * made[0].computed else made[0]
    coords = torch.zeros(total, 3, dtype=torch.int32)
    coords[:, 0] = torch.where(segment[order] == len(names), FREE, segment[order])
    tensors = (x.to(device) for x in (order, inverse(order), coords, best.idx, best.cnt, best.mode))
    listed = best.block, best.block_pairs, best.dense_block_pairs
    return SegmentPlan(total, False, pairs, best.computed, free, *listed, moved, sizes, *tensors)


@dataclass(frozen=True)
class _Lists:
    block: tuple[int, int]
    computed: int
    block_pairs: int
    dense_block_pairs: int
    idx: torch.Tensor
    cnt: torch.Tensor
    mode: torch.Tensor


def _lists(sizes: torch.Tensor, free: int, block: tuple[int, int]) -> _Lists:
    """Lists of the exact block pairs that share a segment or hold a free token, tokens in the plan's order."""
    held, total = int(sizes.sum()), int(sizes.sum()) + free
    ends = sizes.cumsum(0)
    sides = []
    for size in block:
        first = torch.arange(0, total, size)
        last = (first + size).clamp_max(total) - 1
        low, high = (torch.searchsorted(ends, at.clamp_max(held - 1), right=True) for at in (first, last))
        sides.append((low, high, first < held, last >= held, last - first + 1))
    (ql, qh, q_in, q_free, qn), (kl, kh, k_in, k_free, kn) = sides
    ql, qh, q_in, q_free, qn = (x[:, None] for x in (ql, qh, q_in, q_free, qn))
    some = (ql <= kh) & (kl <= qh) & q_in & k_in | q_free | k_free
    whole = (ql == qh) & (kl == kh) & (ql == kl) | ~q_in | ~k_in
    return _Lists(block, int((some * qn * kn).sum()), int(some.sum()), some.numel(), *lists(some, whole))


def attend(
    plan: SegmentPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [B, H, N, D]; k, v [B, Hkv, N, D], any strides, N = plan.total, plan not dense; key_bias fp32 [B, N] or None,
    added to the logits. -> [B, H, N, D]. ValueError when the token count is another."""
    if q.shape[2] != plan.total or k.shape[2] != plan.total or plan.dense:
        raise ValueError(f"These segments are of {plan.total} tokens, got {q.shape[2]} queries, {k.shape[2]} keys.")
    if plan.idx.shape[2] == 0:
        return _gathered(plan, q, k, v, q.shape[3] ** -0.5 if scale is None else scale, key_bias)
    weight = None if key_bias is None else key_bias.float()
    if plan.moved:
        q, k, v = (x.index_select(2, plan.order) for x in (q, k, v))
        weight = None if weight is None else weight.index_select(-1, plan.order)
    lists = plan.idx, plan.cnt, plan.mode, plan.coords, plan.coords, weight
    out = block_sparse(q, k, v, *lists, "block_diagonal", 0, 0, scale, *plan.block)[0]
    return out.index_select(2, plan.back) if plan.moved else out


def _gathered(plan: SegmentPlan, q, k, v, scale: float, key_bias: torch.Tensor | None) -> torch.Tensor:
    """The CPU path: whole segments, keys gathered where they do not follow each other."""
    token_bytes = 2 * k.shape[1] * k.shape[3] * k.element_size()
    formed = q.dtype == torch.bfloat16 and multiplies_bfloat16()  # fused attention holds no scores
    scores = SCORE_BYTES // (8 * q.shape[1]) if formed else plan.total**2
    out, lse = outputs(q)
    for b in range(q.shape[0]):
        parts: Iterable[Chunk] = plan.held.get((token_bytes, scores), ())
        if not parts:
            parts = segment_chunks(plan, token_bytes, scores)
            if 8 * (plan.total + int((plan.sizes + plan.free).sum())) <= HELD_BYTES:
                parts = plan.held[token_bytes, scores] = list(parts)
        weight = None if key_bias is None else key_bias[b].float()
        attend_chunks(parts, q[b], k[b], v[b], scale, 1, out[b], lse[b], weight)
    return out


def segment_chunks(plan: SegmentPlan, token_bytes: int, scores: int) -> Iterator[Chunk]:
    """Chunks that name tokens: segments of one size together, as many as stay in cache, then the free tokens.
    token_bytes of one key and value over the heads; scores: the most pairs of a chunk's query piece with its keys."""
    order, total, held = plan.order, plan.total, plan.total - plan.free
    free = order[held:]
    starts = plan.sizes.cumsum(0) - plan.sizes
    for size in plan.sizes.unique().tolist():
        width, at = size + plan.free, starts[plan.sizes == size]
        room = max(1, min(GATHER_BYTES // (width * token_bytes), scores // (width * size)))
        for part in at.split(room):
            own = order[part[:, None] + torch.arange(size)]
            keys = torch.cat([own, free.expand(len(part), -1)], 1).flatten()
            yield from _pieces(own, keys, max(1, scores // (width * len(part))))
    if plan.free:
        yield from _pieces(free[None], torch.arange(total), max(1, scores // total))


def _pieces(queries: torch.Tensor, keys: torch.Tensor, longest: int) -> Iterator[Chunk]:
    """queries int64 [R, M], keys int64 [R * K]: the chunk, its queries cut where there are more than `longest`."""
    for part in queries.split(longest, 1):
        flat = part.flatten()
        yield Chunk(len(part), flat, None, keys, _span(flat), _span(keys), None, None)


def _span(tokens: torch.Tensor) -> slice | None:
    first = int(tokens[0])
    consecutive = bool((tokens == torch.arange(first, first + len(tokens))).all())
    return slice(first, first + len(tokens)) if consecutive else None


def serve(
    state: dict[Any, SegmentPlan],
    call: AttentionCall,
    key: Hashable,
    image: Callable[[Grid], torch.Tensor],
    text: str,
    dense: str,
) -> Answer:
    """The answer of a method whose pattern is segments. image: token grid -> segments int64 [T * H * W]. key: what they
    depend on besides the layout; plans are kept in `state` for the run. dense: the reason where all see all."""
    layout, q = call.places(), call.q
    bias = call.served_bias()
    key = key, layout.grid, layout.image.start, layout.total, q.device
    if key not in state:
        state[key] = build(labels(layout, image(layout.grid), text), device=q.device)
    plan = state[key]
    if plan.dense:
        raise Decline(dense)
    out = attend(plan, q, call.k, call.v, call.scale, bias)
    rows = q.shape[0] * q.shape[1]
    picture = lambda: Picture(lambda: segment_shares(labels(layout, image(layout.grid), text)))  # noqa: E731
    return Answer(out, rows * plan.computed, rows * plan.dense_pairs, picture)
