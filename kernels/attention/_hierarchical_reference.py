"""hierarchical_sparse.py in plain torch, forward and backward: the CPU path, and that of every device without Triton.

Each segment is cut into pieces: query nodes of one head with the keys that they share, gathered side by side into a few
MiB, so that one batched product serves all of them. The segments' results are joined by their log-sum-exp."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ._hierarchical_lists import Pyramid, blocks_of, chosen_slots

GATHER_BYTES = 8 << 20  # keys and values of one piece
SCORES = 1 << 20  # scores of one piece


@dataclass(frozen=True)
class Options:
    scale: float
    enrich: bool
    reweight: bool
    exclude: bool


@dataclass(frozen=True)
class Segment:
    """Keys of one level. idx [B, H, n, W], cnt [B, H, n]: lists of the n query nodes that share one; None: all keys."""

    keys: torch.Tensor  # [B, Hkv, N_l, D]
    values: torch.Tensor
    idx: torch.Tensor | None
    cnt: torch.Tensor | None
    span: int  # query tokens that share a list
    weight: torch.Tensor | None  # [N_l], added to the logits
    flags: torch.Tensor | None  # int8 [B, H, nodes, slots], 1: left out
    fold: int  # query tokens of a row of flags


@dataclass(frozen=True)
class Piece:
    """R query nodes of `rows` tokens each with S slots of keys."""

    tokens: slice
    nodes: int  # R
    blocks: torch.Tensor | None  # int64 [R W] key blocks; None: all keys, S = N_l
    bias: torch.Tensor | None  # [R or 1, 1 or rows, S]


def segments(k, v, kc, vc, idx, cnt, pyramid: Pyramid, options: Options) -> list[Segment]:
    levels, block = pyramid.levels, pyramid.block
    exact = torch.float64 if k.dtype == torch.float64 else torch.float32
    flags = chosen_slots(idx, cnt, pyramid) if options.exclude else None
    found = []
    for level in range(levels + 1 if options.enrich else 1):
        above = pyramid.at(min(level + 1, levels))
        lists = (None, None) if level == levels else (idx[:, :, above], cnt[:, :, above])
        weight = flag = None
        if level and options.reweight:
            weight = pyramid.counts(level, k.device).to(exact).log()
        if level and flags is not None:
            flag = flags[1] if level == levels else flags[0][:, :, pyramid.at(level)]
        at = pyramid.at(level) if level else slice(None)
        keys, values = (kc[:, :, at], vc[:, :, at]) if level else (k, v)
        span = block ** min(level + 1, levels)
        found.append(Segment(keys, values, lists[0], lists[1], span, weight, flag, block**level))
    return found


def _pieces(part: Segment, b: int, h: int, tokens: int, block: int) -> Iterator[Piece]:
    """One head, in the order of its tokens; a last node with fewer tokens is a piece of its own."""
    n, d = part.keys.shape[2:]
    slots = n if part.idx is None else part.idx.shape[3] * block
    room = SCORES // (slots * min(part.span, tokens))
    if part.idx is not None:
        room = min(room, GATHER_BYTES // (8 * slots * d))
    whole, start = tokens // part.span, 0
    while start * part.span < tokens:
        stop = min(start + max(1, room), whole) if start < whole else start + 1
        at = slice(start * part.span, min(stop * part.span, tokens))
        blocks, bias = None, part.weight if part.weight is None else part.weight[None, None]
        if part.idx is not None and part.cnt is not None:
            blocks = part.idx[b, h, start:stop].long()
            held = torch.arange(blocks.shape[1], device=blocks.device) < part.cnt[b, h, start:stop, None]
            key = (blocks[..., None] * block + torch.arange(block, device=blocks.device)).flatten(1)
            live = held.repeat_interleave(block, 1) & (key < n)
            if part.weight is not None:
                bias = part.weight[key.clamp_max(n - 1)].masked_fill_(~live, -math.inf)[:, None]
            elif not bool(live.all()):
                bias = torch.where(live, 0.0, -math.inf)[:, None]
            blocks = blocks.flatten()
        if part.flags is not None:
            row = torch.arange(at.start, at.stop, device=part.flags.device) // part.fold
            off = part.flags[b, h, row].view(stop - start, -1, slots).to(torch.bool)
            bias = torch.where(off, -math.inf, 0.0 if bias is None else bias)
        yield Piece(at, stop - start, blocks, bias)
        start = stop


def _scores(piece: Piece, q: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """q [R, rows, D], keys [R or 1, S, D] -> [R, rows, S]."""
    if keys.shape[0] == 1:
        score = (q.flatten(0, 1) @ keys[0].T).unflatten(0, q.shape[:2]).mul_(scale)
    else:
        score = torch.bmm(q, keys.transpose(1, 2)).mul_(scale)
    return score if piece.bias is None else score.add_(piece.bias)


def _product(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[R, rows, S], [R or 1, S, D] -> [R, rows, D]."""
    if x.shape[0] == 1:
        return (weights.flatten(0, 1) @ x[0]).unflatten(0, weights.shape[:2])
    return torch.bmm(weights, x)


def _gathered(piece: Piece, rows: torch.Tensor, x: torch.Tensor, exact: torch.dtype) -> torch.Tensor:
    """Keys of a piece [R or 1, S, D], out of x [N_l, D] or its blocks_of."""
    if piece.blocks is None:
        return x[None].to(exact)
    return rows.index_select(0, piece.blocks).to(exact).view(piece.nodes, -1, x.shape[1])


def forward(q, k, v, kc, vc, idx, cnt, pyramid, options, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Fills out [B, H, N, D] and lse [B, H, N]."""
    (batch, heads, n, d), exact = q.shape, lse.dtype
    group, parts = heads // k.shape[1], segments(k, v, kc, vc, idx, cnt, pyramid, options)
    for b in range(batch):
        for h in range(heads):
            sums, level = q.new_zeros(n, d, dtype=exact), q.new_full((n,), -math.inf, dtype=exact)
            mine = q[b, h].to(exact)
            for part in parts:
                keys, values = part.keys[b, h // group], part.values[b, h // group]
                rows = [] if part.idx is None else [blocks_of(x, pyramid.block) for x in (keys, values)]
                key_rows, value_rows = rows or (keys, values)
                for piece in _pieces(part, b, h, n, pyramid.block):
                    at = piece.tokens
                    score = _scores(
                        piece, mine[at].unflatten(0, (piece.nodes, -1)), _gathered(piece, key_rows, keys, exact),
                        options.scale,
                    )  # fmt: skip
                    here = score.amax(-1, keepdim=True)
                    share = score.sub_(here.masked_fill(here.isneginf(), 0)).exp_()
                    total = share.sum(-1, keepdim=True)
                    here = (here + total.log()).flatten()
                    new = torch.logaddexp(level[at], here)
                    base = new.masked_fill(new.isneginf(), 0)
                    got = _product(share, _gathered(piece, value_rows, values, exact)) / total.masked_fill(
                        total == 0, 1
                    )
                    sums[at] *= (level[at] - base).exp()[:, None]
                    sums[at] += got.flatten(0, 1) * (here - base).exp()[:, None]
                    level[at] = new
            out[b, h], lse[b, h] = sums, level


def backward(grad_out, grad_lse, q, k, v, kc, vc, idx, cnt, out, lse, pyramid, options) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v, kc, vc, each in its own dtype and contiguous."""
    (batch, heads, n, d), exact = q.shape, lse.dtype
    group, parts = heads // k.shape[1], segments(k, v, kc, vc, idx, cnt, pyramid, options)
    dq = torch.zeros(q.shape, dtype=exact, device=q.device)
    totals = [[torch.zeros(x.shape, dtype=exact, device=q.device) for x in (part.keys, part.values)] for part in parts]
    for b in range(batch):
        for h in range(heads):
            mine, g = q[b, h].to(exact), grad_out[b, h].to(exact)
            delta = (g * out[b, h].to(exact)).sum(-1) - grad_lse[b, h].to(exact)
            level = lse[b, h].masked_fill(lse[b, h].isneginf(), math.inf)
            for part, total in zip(parts, totals, strict=True):
                keys, values = part.keys[b, h // group], part.values[b, h // group]
                rows = [] if part.idx is None else [blocks_of(x, pyramid.block) for x in (keys, values)]
                sums = [torch.zeros_like(x, dtype=exact) for x in rows or (keys, values)]
                key_rows, value_rows = rows or (keys, values)
                for piece in _pieces(part, b, h, n, pyramid.block):
                    at, ks = piece.tokens, _gathered(piece, key_rows, keys, exact)
                    qs, gs, ls, ds = (
                        x[at].unflatten(0, (piece.nodes, -1)) for x in (mine, g, level[:, None], delta[:, None])
                    )
                    share = _scores(piece, qs, ks, options.scale).sub_(ls).exp_()
                    values_here = _gathered(piece, value_rows, values, exact)
                    slope = _product(gs, values_here.transpose(1, 2)).sub_(ds).mul_(share).mul_(options.scale)
                    dq[b, h, at] += _product(slope, ks).flatten(0, 1)
                    for to, weights, x in ((sums[0], slope, qs), (sums[1], share, gs)):
                        if piece.blocks is None:
                            to += weights.flatten(0, 1).T @ x.flatten(0, 1)
                        else:
                            to.index_add_(0, piece.blocks, torch.bmm(weights.mT, x).view(len(piece.blocks), -1))
                for to, got in zip(total, sums, strict=True):
                    to[b, h // group] += got.view(-1, d)[: to.shape[2]]
    coarse = [torch.zeros(x.shape, dtype=exact, device=q.device) for x in (kc, vc)]
    for level, total in enumerate(totals[1:], 1):
        for to, got in zip(coarse, total, strict=True):
            to[:, :, pyramid.at(level)] = got
    return tuple(x.to(q.dtype) for x in (dq, *totals[0], *coarse))
