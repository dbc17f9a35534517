"""The Triton kernels of packed_linear.py."""

from .._triton import tl, triton
from ._decode import bytes_of, columns_of, decoded, rows_of, table_of

SIZES = ["M", "N", "K", "STEPS", "SPAN", "xm", "units", "sb"]
SUM_SIZES = ["TOTAL", "N", "SPLITS"]
_jit = (
    triton.jit(do_not_specialize=["M", "N", "STEPS", "SPAN", "sb", "TOTAL", "SPLITS"])
    if hasattr(triton, "__version__")
    else triton.jit
)


@_jit
def packed_product(
    X, DATA, SCALE, TABLE, BIAS, OUT, M, N, K, STEPS, SPAN, xm, units, sb, CODEC: tl.constexpr, GROUP: tl.constexpr,
    RUN: tl.constexpr, BR: tl.constexpr, SUB: tl.constexpr, PARTS: tl.constexpr, BIASED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """OUT[split] = X W^T over SPAN of the steps: BM x BN of it. The weights are decoded in registers, where they are the
    left operand: OUT is formed as its transpose."""
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    live, live_m = n < N, (rm < M)[None, :]
    row, scale_row = rows_of(DATA, n, units, CODEC, RUN), SCALE + n.to(tl.int64) * sb
    x_row = X + rm.to(tl.int64)[None, :] * xm
    table = table_of(TABLE, CODEC)
    first = tl.program_id(2) * SPAN
    acc = tl.zeros([BN, BM], tl.float32)
    for step in tl.range(first, min(first + SPAN, STEPS)):
        low, high = bytes_of(row, live, step, K, CODEC, GROUP, RUN, BR, SUB)
        for p in tl.static_range(PARTS):
            c, held = columns_of(step, p, CODEC, GROUP, RUN, BR, SUB)
            x = tl.load(x_row + c[:, None], mask=live_m & (held & (c < K))[:, None], other=0.0)  # [BR, BM]
            w = decoded(row, scale_row, table, low, high, live, step, p, CODEC, GROUP, RUN, BR, SUB)
            acc = tl.dot(w.to(x.dtype), x, acc, input_precision="ieee")
    if BIASED:
        acc += tl.load(BIAS + n, mask=live, other=0.0).to(tl.float32)[:, None]
    at = OUT + (tl.program_id(2) * M + rm).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(at, acc.to(OUT.dtype.element_ty), mask=live[:, None] & live_m)


@_jit
def packed_sum(PART, BIAS, OUT, TOTAL, N, SPLITS, BIASED: tl.constexpr, BLOCK: tl.constexpr):
    """OUT = sum over PART [SPLITS, TOTAL], and the bias of each column."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < TOTAL
    acc = tl.zeros([BLOCK], tl.float32)
    at = PART + i
    for _ in range(SPLITS):
        acc += tl.load(at, mask=live, other=0.0)
        at += TOTAL
    if BIASED:
        acc += tl.load(BIAS + i % N, mask=live, other=0.0).to(tl.float32)
    tl.store(OUT + i, acc.to(OUT.dtype.element_ty), mask=live)
