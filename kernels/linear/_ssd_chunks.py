"""Chunks of tokens and the decays between them: what scans with one decay a head and token have in common.

For a log decay a_u <= 0 of each token, state and tokens of one chunk are bound by factors that never exceed 1:

    forward  g_t = sum_{u <= t} a_u    pair exp(g_t - g_s), s < t    enter exp(g_t)        leave exp(g_last - g_s)
    reverse  e_t = sum_{u < t} a_u     pair exp(e_s - e_t), s > t    enter exp(G - e_t)    leave exp(e_s)

`enter` is from the state before the chunk (in the order of the scan) to token t, `leave` from token s to the state
after it, exp(G) = exp(g_last) from state to state. Sums are taken in fp64: differences of fp32 sums would lose the
decay between two neighbours behind a strong one.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from ._reference import exact

CHUNK = 64  # tokens
SLAB = 1 << 20  # numbers of one slab's largest intermediate: a few MB, that stay in the cache of a CPU core
LOWEST = -1e4  # log decay that is 0 in every precision; keeps sums over -inf finite


class Decays(NamedTuple):
    """log [B, H, C, L] (g or e, fp64 but on devices without it), enter and leave [B, H, C, L], total [B, H, C]."""

    log: torch.Tensor
    enter: torch.Tensor
    leave: torch.Tensor
    total: torch.Tensor


def decays(a: torch.Tensor, chunk: int, reverse: bool, dtype: torch.dtype) -> Decays:
    """a [B, H, N], log decays <= 0; tokens that fill the last chunk decay nothing."""
    wide = a.to(torch.float32 if a.device.type == "mps" else torch.float64).clamp(min=LOWEST)
    own = cut(wide, 0, -(-a.shape[2] // chunk), chunk)
    log = own.cumsum(-1)
    last = log[..., -1:]
    if reverse:
        log = log - own
        enter, leave = last - log, log
    else:
        enter, leave = log, last - log
    return Decays(log, enter.exp().to(dtype), leave.exp().to(dtype), last[..., 0].exp().to(dtype))


def cut(x: torch.Tensor, first: int, end: int, chunk: int) -> torch.Tensor:
    """Chunks first .. end of x [B, H, N, ..], zeros behind the last token: [B, H, end - first, chunk, ..]."""
    part = x[:, :, first * chunk : end * chunk]
    missing = (end - first) * chunk - part.shape[2]
    if missing:
        part = pad(part, (*(0, 0) * (x.ndim - 3), 0, missing))
    return part.unflatten(2, (end - first, chunk))


def chunks_of(x: torch.Tensor, first: int, end: int, chunk: int) -> torch.Tensor:
    """cut(), in the precision that sums are kept in."""
    return cut(exact(x[:, :, first * chunk : end * chunk]), 0, end - first, chunk)


def slabs(n: int, chunk: int, row: int) -> Iterator[tuple[int, int]]:
    """(first, end) of runs of chunks of n tokens, each of about SLAB numbers at `row` numbers a token."""
    count = -(-n // chunk)
    step = max(1, SLAB // (row * chunk))
    for first in range(0, count, step):
        yield first, min(first + step, count)


def pairs(
    forward: torch.Tensor | None, reverse: torch.Tensor | None, diagonal: float, dtype: torch.dtype
) -> torch.Tensor:
    """Decay from token s to token t [.., L (t), L (s)] out of the logs [.., L] of the directions that are scanned;
    `diagonal` is how often a token counts for itself."""
    given = forward if reverse is None else reverse
    assert given is not None
    size = given.shape[-1]
    upper = torch.ones(size, size, dtype=torch.bool, device=given.device).triu(1)
    if forward is None or reverse is None:
        between = given[..., :, None] - given[..., None, :]
        between = between if reverse is None else -between
        between = between.masked_fill_(upper if reverse is None else upper.mT, -torch.inf)
    else:
        back = reverse[..., None, :] - reverse[..., :, None]
        between = torch.where(upper, back, forward[..., :, None] - forward[..., None, :])
    decay = between.to(dtype).exp_()
    if diagonal != 1:
        decay.diagonal(dim1=-2, dim2=-1).fill_(diagonal)
    return decay


def carry(parts: torch.Tensor, total: torch.Tensor, start: torch.Tensor | None, backward: bool) -> torch.Tensor:
    """One state after another: parts [B, H, C, S, E], what each chunk adds, become the state before each chunk, in
    place; total [B, H, C] decays it. -> the state behind the last chunk [B, H, S, E]. `backward`: last chunk first."""
    count = parts.shape[2]
    run = torch.zeros_like(parts[:, :, 0]) if start is None else start.to(parts.dtype)
    for i in reversed(range(count)) if backward else range(count):
        after = torch.addcmul(parts[:, :, i], run, total[:, :, i, None, None])
        parts[:, :, i] = run
        run = after
    return run


def tail_sums(x: torch.Tensor) -> torch.Tensor:
    """sum_{u >= t} x_u over the last axis."""
    return x.flip(-1).cumsum(-1).flip(-1)
