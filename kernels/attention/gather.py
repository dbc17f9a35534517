"""Block-sparse attention in plain torch that computes only the listed blocks: the CPU path, and the path of every
device without Triton. Query blocks with like counts form a chunk, their keys are gathered into one dense tensor of a
few MiB (it stays in cache), and one dense attention call serves all heads of the chunk."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ._dense import Scratch, chunk_attention
from ._predicate import allowed, rule_number

GATHER_BYTES = 2 << 20  # keys and values of one chunk; larger ones leave the cache, smaller ones cost more calls
RAGGED = 0.9  # counts from 0.9 to 1 of the chunk's largest share a chunk when its scores are masked anyway


@dataclass(frozen=True)
class Rule:
    """Element predicate of list entries whose mode is not 0. Coordinates int [Nq, 3+] and [Nk, 3+]."""

    name: str
    query_coords: torch.Tensor
    key_coords: torch.Tensor
    radius: int
    temporal_radius: int


@dataclass(frozen=True)
class Lists:
    """idx int [nQ, W], cnt int [nQ], mode like idx or None, for blocks (queries, keys) of tokens (Nq, Nk)."""

    idx: torch.Tensor
    cnt: torch.Tensor
    mode: torch.Tensor | None
    rule: Rule | None
    tokens: tuple[int, int]
    block: tuple[int, int]


@dataclass(frozen=True)
class Chunk:
    """R query blocks with the same number K of gathered keys."""

    rows: int  # R
    queries: torch.Tensor  # int64 [R * block_m], tokens; past the end of a ragged last block the last token again
    real: torch.Tensor | None  # int64, which of `queries` are no such repetition; None: all
    keys: torch.Tensor  # int64: tokens [R * K], or key blocks [R * K / block_n]
    query_span: slice | None  # `queries` where they follow each other, tokens; these need no gather
    key_span: slice | None  # `keys` where they follow each other, key blocks
    bias: torch.Tensor | None  # fp32 [R, block_m or 1, K], 0 or -inf, added to the logits
    dead: torch.Tensor | None  # bool [R, block_m], queries that see nothing; None: there are none

    @property
    def bytes(self) -> int:
        return 4 * self.bias.numel() if self.bias is not None else 0


def element_rule(rule, query_coords, key_coords, radius, temporal_radius, mode) -> Rule | None:
    """The rule of entries whose mode is not 0, None where every entry counts whole."""
    if rule_number(rule) == 0 or mode is None:
        return None
    return Rule(rule, query_coords, key_coords, radius, temporal_radius)


def outputs(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised out [B, H, N, D] and lse [B, H, N] for q; out is token-major memory where q is."""
    return like(q), q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def like(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised, x's shape [B, H, N, D] and dtype, token-major memory where x's is."""
    b, h, n, d = x.shape
    return x.new_empty(b, n, h, d).transpose(1, 2) if x.stride(2) > x.stride(1) else x.new_empty(b, h, n, d)


def check_list(idx: torch.Tensor, cnt: torch.Tensor, blocks: int) -> None:
    """Raises ValueError unless every row lists ascending, different key blocks below `blocks`."""
    live = torch.arange(idx.shape[-1], device=idx.device) < cnt[..., None]
    if ((cnt < 0) | (cnt > idx.shape[-1])).any() or (live & ((idx < 0) | (idx >= blocks))).any():
        raise ValueError(f"A list names a key block outside 0..{blocks - 1} or has more than {idx.shape[-1]} entries.")
    if (live[..., 1:] & (idx[..., 1:] <= idx[..., :-1])).any():
        raise ValueError("Key blocks of a list must ascend, each once. Sort the list and drop repeats.")


def each_list(
    idx: torch.Tensor,
    cnt: torch.Tensor,
    mode: torch.Tensor | None,
    rule: Rule | None,
    q_shape: torch.Size,
    k_shape: torch.Size,
    block: tuple[int, int],
) -> Iterator[tuple[int, slice, slice, Lists]]:
    """For lists of block_sparse, q [B, H, Nq, D] and k [B, Hkv, Nk, D]: (batch entry, query heads, their key heads,
    their list). All heads together where they share one."""
    (batch, heads, nq, _), (kv, nk) = q_shape, k_shape[1:3]
    shared = idx.shape[1] == 1 and cnt.shape[1] == 1
    for b in range(batch):
        for h in range(1 if shared else heads):
            mine = slice(0, heads) if shared else slice(h, h + 1)
            own = slice(0, kv) if shared else slice(h * kv // heads, h * kv // heads + 1)
            at = min(b, idx.shape[0] - 1), min(h, idx.shape[1] - 1)
            row_cnt = cnt[min(b, cnt.shape[0] - 1), min(h, cnt.shape[1] - 1)]
            entry_mode = None if mode is None else mode[at]
            yield b, mine, own, Lists(idx[at], row_cnt, entry_mode, rule, (nq, nk), block)


def chunks(lists: Lists, token_bytes: int, order: torch.Tensor | None = None) -> Iterator[Chunk]:
    """token_bytes of one key and value over the heads that share the list. order int64 [N] (queries and keys are the
    same tokens): block i of the lists is order[i * block : (i + 1) * block], and `keys` names tokens; without it,
    blocks. Query blocks with an empty list are left out."""
    (nq, nk), (block_m, block_n) = lists.tokens, lists.block
    idx, cnt, device = lists.idx, lists.cnt, lists.idx.device
    masked = nk % block_n != 0 or lists.rule is not None
    if lists.rule is None:
        same = _repeats(idx, cnt)
        idx, cnt, block_m = idx[::same], cnt[::same], block_m * same
    sequence = cnt.argsort(descending=True, stable=True)
    counts, numbers = cnt[sequence].tolist(), sequence.tolist()
    start, end = 0, len(counts) - counts.count(0)
    while start < end:
        width = counts[start]
        least = math.ceil(RAGGED * width) if masked else width
        room = max(1, GATHER_BYTES // (width * block_n * token_bytes))
        stop = start
        while stop < end and stop - start < room and counts[stop] >= least:
            stop += 1
        rows, listed = sequence[start:stop], idx[sequence[start:stop], :width].long()
        query_span = None
        if order is None and numbers[start:stop] == [*range(numbers[start], numbers[start] + stop - start)]:
            query_span = slice(numbers[start] * block_m, (numbers[stop - 1] + 1) * block_m)
        if query_span is not None and query_span.stop <= nq:
            queries, real = torch.arange(query_span.start, query_span.stop, device=device), None
        else:
            query_span = None
            queries = (rows[:, None] * block_m + torch.arange(block_m, device=device)).flatten()
            real = (queries < nq).nonzero()[:, 0] if nq % block_m else None
            queries.clamp_max_(nq - 1)
        seen = None
        if masked:
            slots = torch.arange(width, device=device) < cnt[rows, None]
            listed.masked_fill_(~slots, 0)
        tokens = listed
        if masked or order is not None:
            tokens = (listed[..., None] * block_n + torch.arange(block_n, device=device)).flatten(1)
        if masked:
            seen = _seen(lists, rows, slots, queries.view(len(rows), -1), tokens)
            seen = None if bool(seen.all()) else seen
        dead = None if seen is None or bool(seen.any(-1).all()) else ~seen.any(-1).expand(-1, block_m)
        bias = None if seen is None else torch.where(seen, 0.0, -math.inf)
        keys = listed.flatten()
        key_span = _span(keys) if order is None else None
        if order is not None:
            keys, queries = order[tokens.clamp_max_(nk - 1).flatten()], order[queries]
        yield Chunk(len(rows), queries, real, keys, query_span, key_span, bias, dead)
        start = stop


def _repeats(idx: torch.Tensor, cnt: torch.Tensor) -> int:
    """The largest g such that each aligned run of g query blocks has one list: they count as one block."""
    live = torch.arange(idx.shape[1], device=idx.device) < cnt[:, None]
    listed = torch.where(live, idx, -1)
    new = (cnt[1:] != cnt[:-1]) | (listed[1:] != listed[:-1]).any(1)
    return math.gcd(*(new.nonzero()[:, 0] + 1).tolist(), len(cnt))


def _span(x: torch.Tensor) -> slice | None:
    """x int64 [n] as a slice, if each follows the one before it."""
    first, last = int(x[0]), int(x[-1])
    if last - first != len(x) - 1 or not bool((x[1:] - x[:-1] == 1).all()):
        return None
    return slice(first, last + 1)


def _seen(lists: Lists, rows, slots, queries, tokens) -> torch.Tensor:
    """bool [R, block_m or 1, K]: the pairs that count."""
    (_, nk), (_, block_n), rule = lists.tokens, lists.block, lists.rule
    live = (slots.repeat_interleave(block_n, 1) & (tokens < nk))[:, None, :]
    if rule is None or lists.mode is None:
        return live
    whole = (lists.mode[rows, : slots.shape[1]] == 0).repeat_interleave(block_n, 1)[:, None, :]
    query, key = rule.query_coords[queries], rule.key_coords[tokens.clamp_max(nk - 1)]
    return live & (whole | allowed(rule.name, query, key, rule.radius, rule.temporal_radius))


def attend(
    parts: Iterable[Chunk],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    unit: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    log_weight: torch.Tensor | None = None,
    scratch: Scratch | None = None,
) -> None:
    """One batch entry: q [H, Nq, D], k and v [Hkv, Nk, D], log_weight fp32 [Nk]; unit 1 where the chunks name tokens,
    block_n where they name blocks. Writes the queries that the chunks hold into out [H, Nq, D] and lse [H, Nq].
    scratch: shared with other calls of the same operator."""
    heads, d = q.shape[0], q.shape[-1]
    group = heads // k.shape[0]
    query, key, value = q, rows_of(k, unit), rows_of(v, unit)
    weight = None if log_weight is None else rows_of(log_weight[None, :, None], unit)
    scratch = scratch or Scratch()
    for part in parts:
        if part.query_span is None:
            query = rows_of(query, 1)
            qs = gather(query, part.queries, part.rows, d)
        else:
            qs = q[:, part.query_span].unflatten(1, (part.rows, -1)).transpose(0, 1)
        qs = qs.unflatten(1, (-1, group)).flatten(2, 3)
        bias, dead = part.bias, part.dead
        if bias is not None and group > 1 and bias.shape[1] > 1:
            bias = bias.repeat(1, group, 1)
        bias = None if bias is None else bias[:, None]
        at = part.keys if part.key_span is None else part.key_span
        if weight is not None:
            added = gather(weight, at, part.rows, 1)[..., 0][:, :, None]
            bias = added if bias is None else bias + added
            dead = bias.isneginf().all(-1)[:, 0].expand(-1, qs.shape[2])[:, : qs.shape[2] // group]
        ks, vs = (gather(x, at, part.rows, d, scratch, name) for x, name in ((key, "keys"), (value, "values")))
        o, level = chunk_attention(qs, ks, vs, bias, scale, scratch)
        o, level = (x.unflatten(2, (group, -1)).flatten(1, 2).transpose(0, 1) for x in (o, level))
        if dead is not None:
            level, o = level.masked_fill(dead, -math.inf), o.masked_fill(dead[..., None], 0)
        if part.query_span is not None:
            for to, x in ((out, o), (lse, level)):
                to[:, part.query_span].unflatten(1, (part.rows, -1)).copy_(x)
            continue
        o, level, at = o.flatten(1, 2), level.flatten(1, 2), part.queries
        if part.real is not None:
            o, level, at = o.index_select(1, part.real), level.index_select(1, part.real), at[part.real]
        out.index_copy_(1, at, o.to(out.dtype))
        lse.index_copy_(1, at, level.to(lse.dtype))


def rows_of(x: torch.Tensor, unit: int) -> torch.Tensor:
    """[H, N, D] -> contiguous [H, rows, unit * D]: a head's tokens side by side, which attention reads fastest, in rows
    that a gather copies whole."""
    short = -x.shape[1] % unit
    x = F.pad(x, (0, 0, 0, short)) if short else x.contiguous()
    return x.unflatten(1, (-1, unit)).flatten(2)


def gather(
    x: torch.Tensor, rows: torch.Tensor | slice, count: int, d: int, scratch: Scratch | None = None, name: str = ""
) -> torch.Tensor:
    """rows_of [H, n, unit * D], rows int64 [count * k] or k consecutive ones -> [count, H, k * unit, D]; no copy for
    consecutive ones, else into `name` of the scratch memory, if given."""
    if isinstance(rows, slice):
        x = x[:, rows]
    elif scratch is None or x.device.type != "cpu":
        x = x.index_select(1, rows)
    else:
        to = scratch.take(name, (x.shape[0], len(rows), x.shape[2]), x, x.dtype)
        x = torch.index_select(x, 1, rows, out=to)
    return x.unflatten(1, (count, -1)).unflatten(3, (-1, d)).flatten(2, 3).transpose(0, 1)
