"""The k best of each row of scores, as an ascending list of columns: block lists for sparse attention (SLA, arXiv
2509.24006, section 4; LLSA, arXiv 2512.16615, section 3.2).

Equal scores go to the lower column. A score of -inf or NaN is never chosen, so a row may list fewer than k. The list of
a row is a function of its scores alone: the same on every device.

The kernel finds the k-th best score by bisection over the 2^32 values of an integer whose order is that of the floats
(32 counts, in registers where the row fits), then compacts what is above it with a prefix sum. No sort, no
atomics.

`hierarchical` selects level by level in a pyramid of pooled queries and keys: every node of the coarsest level against
every node there, then each node only against the children of what its parent chose, k block of them. N log N scores
instead of (N / block)^2. The last lists name blocks of tokens.
"""

import logging
from collections.abc import Sequence

import torch

from .._triton import on_gpu, tl, triton

TILE = 4096  # scores that a program holds in registers
GATHER_BYTES = 8 << 20  # gathered keys of one chunk, as in gather.py


def _check(scores: torch.Tensor, k: int, mask: torch.Tensor | None) -> None:
    if scores.ndim < 2 or scores.shape[-1] < 1 or not scores.is_floating_point():
        raise ValueError(f"topk needs float scores [..., nQ, nK], nK > 0, got {[*scores.shape]} {scores.dtype}.")
    if k < 1:
        raise ValueError(f"topk needs k of at least 1, got {k}. Round a fraction of the columns up to 1.")
    if mask is not None:
        try:
            fits = torch.broadcast_shapes(mask.shape, scores.shape) == scores.shape
        except RuntimeError:
            fits = False
        if not fits or mask.dtype != torch.bool:
            raise ValueError(f"mask {[*mask.shape]} {mask.dtype} must be bool and broadcast to {[*scores.shape]}.")


def _ruled(scores, mask, keep_first: int, keep_diagonal: bool) -> torch.Tensor:
    """Scores with +inf where a column is kept always, -inf where never."""
    if keep_first > 0 or keep_diagonal:
        rows, columns = scores.shape[-2:]
        column = torch.arange(columns, device=scores.device)
        kept = (column < keep_first).expand(rows, columns)
        if keep_diagonal:
            row = torch.arange(rows, device=scores.device)[:, None]
            kept = kept | (column >= row * columns // rows) & (column < -(-(row + 1) * columns // rows))
        scores = scores.masked_fill(kept, torch.inf)
    return scores if mask is None else scores.masked_fill(mask, -torch.inf)


def reference(
    scores: torch.Tensor,
    k: int,
    mask: torch.Tensor | None = None,
    keep_first: int = 0,
    keep_diagonal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """scores [..., nQ, nK], any strides -> idx int32 [..., nQ, min(k, nK)] ascending, 0 behind the row's entries, and
    cnt int32 [..., nQ]. mask bool, broadcast to scores: True is never listed. keep_first: so many first columns are
    listed before all others; keep_diagonal: so are those that cover the row's own place, columns i nK / nQ to
    (i + 1) nK / nQ. Both count towards k. Raises ValueError for k < 1 and a mask that does not fit."""
    _check(scores, k, mask)
    scores = _ruled(scores, mask, keep_first, keep_diagonal)
    width = min(k, scores.shape[-1])
    scores = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    least = scores.topk(width, sorted=True).values[..., -1:]
    above, level = scores > least, (scores == least) & (least > -torch.inf)
    room = width - above.sum(-1, keepdim=True, dtype=torch.int32)
    chosen = above | (level & (level.cumsum(-1, dtype=torch.int32) <= room))
    place = torch.where(chosen, chosen.cumsum(-1) - 1, width)
    column = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device).expand(scores.shape)
    idx = torch.zeros(*scores.shape[:-1], width + 1, dtype=torch.int32, device=scores.device)
    idx.scatter_(-1, place, column)
    return idx[..., :width].contiguous(), chosen.sum(-1, dtype=torch.int32)


@triton.jit
def _ordered(s, live):
    """fp32 -> int32 of the same order; NaN and -inf, and what is not live, give the least."""
    s = tl.where(s == 0, 0.0, s)  # -0 equals 0
    bits = s.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(live & (s > float("-inf")), order, -2147483648)


SIZES = ["ROWS_ALL", "N", "K"]
_jit = triton.jit(do_not_specialize=SIZES) if hasattr(triton, "__version__") else triton.jit


@_jit
def topk_kernel(S, IDX, CNT, ROWS_ALL, N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """ROWS rows that fit into registers. S [ROWS_ALL, N] contiguous, IDX [ROWS_ALL, K]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    live = (row < ROWS_ALL)[:, None] & (column < N)[None, :]
    order = _ordered(tl.load(S + row[:, None] * N + column[None, :], live, 0.0).to(tl.float32), live)
    low = tl.full([ROWS], -2147483648, tl.int32)  # at least K are >= low, where the row has so many
    high = tl.full([ROWS], 2147483647, tl.int32)
    for _ in tl.range(0, 32):
        middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up, without overflow
        enough = tl.sum((order >= middle[:, None]).to(tl.int32), 1) >= K
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    above = order > low[:, None]
    level = (order == low[:, None]) & (order > -2147483648)
    room = K - tl.sum(above.to(tl.int32), 1)
    chosen = above | (level & (tl.cumsum(level.to(tl.int32), 1) <= room[:, None]))
    place = tl.cumsum(chosen.to(tl.int32), 1) - 1
    tl.store(IDX + row[:, None] * K + place, column[None, :] + tl.zeros([ROWS, COLUMNS], tl.int32), chosen)
    tl.store(CNT + row, tl.sum(chosen.to(tl.int32), 1), row < ROWS_ALL)


@_jit
def topk_long_kernel(S, IDX, CNT, ROWS_ALL, N, K, COLUMNS: tl.constexpr):
    """One row longer than a program holds, read anew for each count."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    at = S + row * N
    low = tl.full([], -2147483648, tl.int32)
    high = tl.full([], 2147483647, tl.int32)
    for _ in tl.range(0, 32):
        middle = (low | high) - ((low ^ high) >> 1)
        count = tl.zeros([COLUMNS], tl.int32)
        for start in tl.range(0, N, COLUMNS):
            live = column < N - start
            order = _ordered(tl.load(at + start + column, live, 0.0).to(tl.float32), live)
            count += (order >= middle).to(tl.int32)
        enough = tl.sum(count, 0) >= K
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    above = tl.zeros([COLUMNS], tl.int32)
    for start in tl.range(0, N, COLUMNS):
        live = column < N - start
        order = _ordered(tl.load(at + start + column, live, 0.0).to(tl.float32), live)
        above += (order > low).to(tl.int32)
    room = K - tl.sum(above, 0)
    listed = tl.full([], 0, tl.int32)
    for start in tl.range(0, N, COLUMNS):
        live = column < N - start
        order = _ordered(tl.load(at + start + column, live, 0.0).to(tl.float32), live)
        level = ((order == low) & (order > -2147483648)).to(tl.int32)
        chosen = ((order > low) | ((level > 0) & (tl.cumsum(level, 0) <= room))).to(tl.int32)
        place = listed + tl.cumsum(chosen, 0) - 1
        tl.store(IDX + row * K + place, start + column, chosen > 0)
        listed += tl.sum(chosen, 0)
        room -= tl.sum(level, 0)
    tl.store(CNT + row, listed)


topk = torch.library.custom_op("tessera::topk", reference, mutates_args=())


@topk.register_fake
def _(scores, k, mask=None, keep_first=0, keep_diagonal=False):
    lead, width = scores.shape[:-1], min(k, scores.shape[-1])
    idx = torch.empty(*lead, width, dtype=torch.int32, device=scores.device)
    return idx, torch.empty(lead, dtype=torch.int32, device=scores.device)


@on_gpu(topk)
def launch(
    scores: torch.Tensor,
    k: int,
    mask: torch.Tensor | None = None,
    keep_first: int = 0,
    keep_diagonal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference, which serves fp64."""
    _check(scores, k, mask)
    if scores.dtype == torch.float64:
        logging.getLogger("tessera").debug("topk: reference serves %s", scores.dtype)
        return reference(scores, k, mask, keep_first, keep_diagonal)
    scores = _ruled(scores, mask, keep_first, keep_diagonal).contiguous()
    n, rows = scores.shape[-1], scores[..., 0].numel()
    k = min(k, n)
    idx = torch.zeros(*scores.shape[:-1], k, dtype=torch.int32, device=scores.device)
    cnt = torch.empty(scores.shape[:-1], dtype=torch.int32, device=scores.device)
    columns = max(16, triton.next_power_of_2(n))
    if rows and columns > TILE:
        topk_long_kernel[(rows,)](scores, idx, cnt, rows, n, k, COLUMNS=TILE, num_warps=8)
    elif rows:
        tile, warps = _tile(columns)
        grid = (triton.cdiv(rows, tile),)
        topk_kernel[grid](scores, idx, cnt, rows, n, k, ROWS=tile, COLUMNS=columns, num_warps=warps)
    return idx, cnt


def _tile(columns: int) -> tuple[int, int]:
    """Rows of a program and its warps."""
    return max(1, 1024 // columns), 8 if columns > 2048 else 4


@torch.no_grad()
def hierarchical(
    queries: Sequence[torch.Tensor], keys: Sequence[torch.Tensor], block: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """queries [B, H, N_l, D] and keys [B, Hkv, N_l, D] for the levels l = 1, 2 .. of a pyramid, finest first, N_l =
    ceil(N_(l-1) / block) -> idx int32 [B, H, M, W] and cnt int32 [B, H, M], M = N_1 + N_2 + .. rows, level after level,
    W = min(k, N_1): each row lists nodes of its own level, ascending. Scores are products q . k in fp32 (fp64 for
    fp64). Raises ValueError when the sizes of the levels do not fit."""
    if not queries or len(queries) != len(keys):
        raise ValueError(f"Selection needs queries and keys of each level, got {len(queries)} and {len(keys)} levels.")
    for fine, coarse in zip(queries[:-1], queries[1:], strict=True):
        if coarse.shape[2] != -(-fine.shape[2] // block):
            raise ValueError(f"{fine.shape[2]} nodes pool to {coarse.shape[2]} in blocks of {block}; pool each level.")
    for q, x in zip(queries, keys, strict=True):
        if (q.shape[0], q.shape[2], q.shape[3]) != (x.shape[0], x.shape[2], x.shape[3]) or q.shape[1] % x.shape[1]:
            raise ValueError(f"Pooled queries {[*q.shape]} do not fit pooled keys {[*x.shape]}: [B, H, N, D] each.")
    exact = torch.float64 if queries[0].dtype == torch.float64 else torch.float32
    group = queries[0].shape[1] // keys[0].shape[1]
    q, x = queries[-1].to(exact), keys[-1].to(exact).repeat_interleave(group, 1)
    idx, cnt = topk(q @ x.transpose(2, 3), k)
    lists = [(idx, cnt)]
    for q, x in zip(queries[-2::-1], keys[-2::-1], strict=True):
        idx, cnt = _refined(q.to(exact), x, idx, cnt, block, k)
        lists.insert(0, (idx, cnt))
    width = max(i.shape[-1] for i, _ in lists)
    padded = [torch.nn.functional.pad(i, (0, width - i.shape[-1])) for i, _ in lists]
    return torch.cat(padded, 2), torch.cat([c for _, c in lists], 2)


def _refined(q, keys, idx, cnt, block: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One level down: q [B, H, n, D], keys [B, Hkv, n, D], the parents' lists idx [B, H, m, w] and cnt."""
    (b, h, n, d), (m, w) = q.shape, idx.shape[2:]
    short, kv = m * block - n, keys.shape[1]
    q = torch.nn.functional.pad(q, (0, 0, 0, short)).reshape(b * h * m, block, d)
    source = torch.nn.functional.pad(keys, (0, 0, 0, short)).reshape(b * kv * m, block * d)
    head = torch.arange(b * h, device=q.device).view(b, h, 1, 1)
    rows = ((head // h * kv + head % h * kv // h) * m + idx).view(b * h * m, w)
    scores = q.new_empty(len(rows), block, w * block)
    step = max(1, GATHER_BYTES // (w * block * d * q.element_size())) if q.device.type == "cpu" else len(rows)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        chosen = source[rows[part].flatten()].to(q.dtype).view(-1, w * block, d)
        torch.matmul(q[part], chosen.transpose(1, 2), out=scores[part])
    nodes = idx.long()[..., None] * block + torch.arange(block, device=q.device)  # [B, H, m, w, block]
    held = (torch.arange(w, device=q.device) < cnt[..., None])[..., None] & (nodes < n)
    slots, count = topk(scores.view(b, h, m, block, -1), min(k, n), ~held.flatten(3)[:, :, :, None])
    picked = nodes.flatten(3)[:, :, :, None].expand(-1, -1, -1, block, -1).gather(4, slots.long())
    picked = picked.masked_fill(torch.arange(slots.shape[-1], device=q.device) >= count[..., None], 0)
    return picked.int().flatten(2, 3)[:, :, :n], count.flatten(2, 3)[:, :, :n]


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """A tenth of the blocks of 64 tokens, 12 heads."""
    blocks = -(-tokens // 64)
    return torch.randn(1, 12, blocks, blocks, device=device).to(dtype), max(1, blocks // 10)


def aot_specs() -> list[dict]:
    specs = []
    for columns in (16, 128, 512, 1024, 2048, 4096, 2 * TILE):
        for dtype in ("fp32", "bf16"):
            long = columns > TILE
            tile, warps = _tile(columns)
            sizes = {"COLUMNS": TILE} if long else {"ROWS": tile, "COLUMNS": columns}
            specs.append(
                {
                    "kernel": "topk_long_kernel" if long else "topk_kernel",
                    "args": {"S": f"*{dtype}", "IDX": "*i32", "CNT": "*i32"} | dict.fromkeys(SIZES, "i32"),
                    "const": sizes,
                    "warps": 8 if long else warps,
                    "tag": f"{columns} columns {dtype}",
                    "unaligned": tuple(SIZES),
                    "extra": dtype != "fp32" or columns not in (4096, 2 * TILE),
                }
            )
    return specs
