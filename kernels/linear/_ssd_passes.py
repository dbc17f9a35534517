"""Forward and backward of ssd.py in torch, on chunks: everything inside a chunk is a product of matrices.

Heads that share B and C are axis R beside their group, [B, G, R, C, L, ..]. Gradients for one chunk, with M the decays
between its tokens, S its incoming state and Z the gradient of the state it leaves behind:

    W = (dy x^T) * M     dC = W B + enter dy S^T     dB = W^T C + leave x Z^T     dx = (C B^T * M)^T dy + leave B Z

and the gradient of the summed log decay of a token is what its terms of + g give minus what its terms of - g give.
"""

from typing import Any, NamedTuple

import torch

from ._reference import exact, rows_like
from ._ssd_chunks import CHUNK, Decays, carry, chunks_of, decays, pairs, slabs, tail_sums

FORWARD, REVERSE = 0, 1
DIRECTIONS = {"forward": (FORWARD,), "reverse": (REVERSE,), "both": (FORWARD, REVERSE)}


class Scan(NamedTuple):
    """What a call asks for: the scanned directions, the decays of each, how often a token counts for itself."""

    ways: tuple[int, ...]
    of: tuple[Decays, ...]
    diagonal: float

    def between(self, first: int, end: int, groups: int) -> torch.Tensor:
        """Pair decays of some chunks, [B, G, R, c, L, L]."""
        logs = {way: d.log[:, :, first:end] for way, d in zip(self.ways, self.of, strict=True)}
        made = pairs(logs.get(FORWARD), logs.get(REVERSE), self.diagonal, self.of[0].enter.dtype)
        return made.unflatten(1, (groups, -1))


def scan_of(a, a_reverse, direction: str, diagonal: int, dtype: torch.dtype, chunk: int = CHUNK) -> Scan:
    ways = DIRECTIONS[direction]
    own = {FORWARD: a, REVERSE: a if a_reverse is None else a_reverse}
    made = tuple(decays(own[way], chunk, way == REVERSE, dtype) for way in ways)
    return Scan(ways, made, float(diagonal) if len(ways) == 2 else 1.0)


def _weighted(rows: torch.Tensor, weight: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """rows [B, G, 1 or R, c, L, S] times one weight [B, H, C, L] a token."""
    return rows * weight[:, :, first:end].unflatten(1, (rows.shape[1], -1))[..., None]


def _grouped(x: torch.Tensor, first: int, end: int, groups: int) -> torch.Tensor:
    return chunks_of(x, first, end, CHUNK).unflatten(1, (groups, -1))


def _sums(rows, weights: list[torch.Tensor], x) -> list[torch.Tensor]:
    """For each weight: sum_t weight_t rows_t x_t^T of every chunk [B, H, C, S, E]. rows [B, G, N, S], x [B, H, N, E]."""
    groups, n = rows.shape[1:3]
    parts: list[list[torch.Tensor]] = [[] for _ in weights]
    for first, end in slabs(n, CHUNK, x.shape[0] * x.shape[1] * max(x.shape[3], rows.shape[3])):
        r, v = _grouped(rows, first, end, groups), _grouped(x, first, end, groups)
        for to, weight in zip(parts, weights, strict=True):
            to.append((_weighted(r, weight, first, end).mT @ v).flatten(1, 2))
    return [torch.cat(part, 2) for part in parts]


def _states(scan: Scan, rows, x, start, leaving: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The state before each chunk, and behind the last one, of every direction. With leaving = False the gradients of
    these: they run against the scan and enter where the state left."""
    parts = _sums(rows, [d.leave if leaving else d.enter for d in scan.of], x)
    last = []
    for i, (way, d) in enumerate(zip(scan.ways, scan.of, strict=True)):
        last.append(carry(parts[i], d.total, None if start is None else start[i], (way == REVERSE) == leaving))
    return parts, last


def starts(state: torch.Tensor | None, direction: str) -> torch.Tensor | None:
    """A state as an axis of directions and [B, H, S, E]."""
    return state if state is None or direction == "both" else state[None]


def stacked(states: list[torch.Tensor], direction: str) -> torch.Tensor:
    return torch.stack(states) if direction == "both" else states[0]


def forward(x, b, c, a, state, direction, a_reverse, diagonal) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, H, N, E] and the final state(s)."""
    (batch, heads, n, e), groups = x.shape, b.shape[1]
    scan = scan_of(a, a_reverse, direction, diagonal, exact(x[:0]).dtype)
    held, last = _states(scan, b, x, starts(state, direction), True)
    out = rows_like(x, e)
    for first, end in slabs(n, CHUNK, batch * heads * max(CHUNK, e)):
        cs, bs, xs = (_grouped(t, first, end, groups) for t in (c, b, x))
        y = (cs @ bs.mT * scan.between(first, end, groups)) @ xs
        for d, h in zip(scan.of, held, strict=True):
            y += _weighted(cs @ h[:, :, first:end].unflatten(1, (groups, -1)), d.enter, first, end)
        tokens = slice(first * CHUNK, min(end * CHUNK, n))
        out[:, :, tokens] = y.flatten(3, 4).flatten(1, 2)[:, :, : tokens.stop - tokens.start].to(out.dtype)
    return out, stacked(last, direction)


def backward(grad, grad_state, x, b, c, a, state, direction, a_reverse, diagonal):
    """Gradients of x, b, c, the log decays of both directions (None where one is not scanned) and the state(s)."""
    (batch, heads, n, e), groups, full = x.shape, b.shape[1], exact(x[:0]).dtype
    scan = scan_of(a, a_reverse, direction, diagonal, full)
    held, _ = _states(scan, b, x, starts(state, direction), True)
    back, first_grad = _states(scan, c, grad, starts(grad_state, direction), False)
    dx, db, dc = (rows_like(t, t.shape[3]) for t in (x, b, c))
    da = [torch.zeros(batch, heads, n, dtype=full, device=x.device) for _ in scan.ways]
    for first, end in slabs(n, CHUNK, batch * heads * max(CHUNK, e, b.shape[3])):
        tokens = slice(first * CHUNK, min(end * CHUNK, n))
        states = [t[:, :, first:end].unflatten(1, (groups, -1)) for t in (*held, *back)]
        rows = [_grouped(t, first, end, groups) for t in (grad, x, b, c)]
        got, decay_grads = _chunk_gradients(scan, rows, states, first, end)
        for to, of, shared in zip((dx, db, dc), got, (False, True, True), strict=True):
            of = of.sum(2) if shared else of.flatten(1, 2)
            to[:, :, tokens] = of.flatten(2, 3)[:, :, : tokens.stop - tokens.start].to(to.dtype)
        for to, of in zip(da, decay_grads, strict=True):
            to[:, :, tokens] = of.flatten(1, 2).flatten(2)[:, :, : tokens.stop - tokens.start]
    of_way = dict(zip(scan.ways, da, strict=True))
    return dx, db, dc, of_way.get(FORWARD), of_way.get(REVERSE), stacked(first_grad, direction)


def _chunk_gradients(scan: Scan, rows: list[Any], states: list[torch.Tensor], first: int, end: int):
    """dx, dB, dC [B, G, R, c, L, ..] of some chunks, and the gradient of each direction's log decay."""
    dy, x, b, c = rows
    ways = len(scan.ways)
    between = scan.between(first, end, b.shape[1])
    scores, w = c @ b.mT, dy @ x.mT * between
    pulled = w * scores  # what each pair of tokens adds to the loss
    dx, dc, db = (scores * between).mT @ dy, w @ b, w.mT @ c
    decay_grads = []
    for i, (way, d) in enumerate(zip(scan.ways, scan.of, strict=True)):
        held, back = states[i], states[ways + i]
        entered = _weighted(dy @ held.mT, d.enter, first, end)
        left = _weighted(x @ back.mT, d.leave, first, end)
        dc, db = dc + entered, db + left
        dx = dx + _weighted(b @ back, d.leave, first, end)
        own = pulled.tril(-1) if way == FORWARD else pulled.triu(1)
        # The token's terms of + and of - its own log sum; the last one of the chunk also decays the whole state.
        to, out_of = own.sum(-1) + (entered * c).sum(-1), own.sum(-2) + (left * b).sum(-1)
        through = (held * back).sum((-1, -2)) * d.total[:, :, first:end].unflatten(1, (b.shape[1], -1))
        if way == FORWARD:
            decay_grads.append(tail_sums(to - out_of) + (through + (left * b).sum((-1, -2)))[..., None])
        else:  # e_t leaves out a_t itself
            net = out_of - to
            whole = through + (entered * c).sum((-1, -2))
            decay_grads.append(tail_sums(net) - net + whole[..., None])
    return (dx, db, dc), decay_grads
