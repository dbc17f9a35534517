"""The Triton kernels of linear attention: sums over tokens, their running total over chunks, the product with queries,
and the gradient of a feature map's input.

Every kernel takes a table SPANS [P, 3] of (chunk, first token, end token), so one chunk, many chunks and a chunk
shared by several programs are the same code. A state is packed: F rows of E sums, then F masses, W = F (E + 1) floats.
Head sizes are padded to a power of two: these kernels wait for memory, and masked columns are not read.
"""

from .._triton import tl, triton
from ..attention._tiles import load_tile, store_tile

MAPS = {"identity": 0, "relu": 1, "elu1": 2, "softmax": 3, "hedgehog": 3}
NORMS = {"none": 0, "sum": 1, "mean": 1, "rms": 2}
SIZES = ["P", "C", "W", "N", "xb", "xh", "rb", "rh", "vb", "vh", "ob", "oh", "zb", "zh"]
_jit = triton.jit(do_not_specialize=SIZES) if hasattr(triton, "__version__") else triton.jit


@triton.jit
def _features(x, live, column, sign, D: tl.constexpr, MAP: tl.constexpr):
    """phi(x) in fp32, x [N, BD]; 0 in dead rows and from column D on, where phi(0) need not be 0."""
    x = x.to(tl.float32)
    inside = live[:, None] & (column < D)[None, :]
    if MAP == 1:
        f = tl.maximum(x, 0.0)
    elif MAP == 2:
        f = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif MAP == 3:
        s = tl.where((column < D)[None, :], sign * x, float("-inf"))
        e = tl.exp(s - tl.max(s, 1)[:, None])
        f = e / tl.sum(e, 1)[:, None]
    else:
        f = x
    return tl.where(inside, f, 0.0)


@triton.jit
def _chain(g, x, f, sign, MAP: tl.constexpr):
    """Gradient of x [N, BD] from g, that of f = phi(x)."""
    x = x.to(tl.float32)
    if MAP == 1:
        return tl.where(x > 0, g, 0.0)
    elif MAP == 2:
        return g * tl.where(x > 0, 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif MAP == 3:
        return sign * f * (g - tl.sum(f * g, 1)[:, None])
    else:
        return g


@triton.jit
def _load_sums(S, first, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr):
    """Columns first .. first + BE of the sums of one half, fp32 [BD, BE]."""
    d, e = tl.arange(0, BD), first + tl.arange(0, BE)
    return tl.load(S + d[:, None] * E + e[None, :], mask=(d < D)[:, None] & (e < E)[None, :], other=0.0)


@triton.jit
def _multiply(x, s, acc):
    """acc + x s for fp32 sums s. A 16-bit x meets s in two 16-bit parts, which keep twice its own precision; fp16
    parts are scaled first, because sums over many tokens leave its range."""
    if x.dtype == tl.float32:
        return tl.dot(x, s, acc, input_precision="ieee")
    elif x.dtype == tl.float16:
        big = tl.maximum(tl.max(tl.abs(s)), 1e-30)
        power = tl.math.exp2(tl.floor(tl.math.log2(big)))
        s = s / power
        high = s.to(x.dtype)
        part = tl.dot(x, (s - high.to(tl.float32)).to(x.dtype))
        return acc + power * tl.dot(x, high, part)
    else:
        high = s.to(x.dtype)
        acc = tl.dot(x, (s - high.to(tl.float32)).to(x.dtype), acc)
        return tl.dot(x, high, acc)


@_jit
def linear_state(
    X, XR, V, FACTOR, SLOPE, PART, SPANS, gain, P, N, W, xb, xh, xn, rb, rh, rn, vb, vh, vn,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
    MAP: tl.constexpr, HALVES: tl.constexpr, DUAL: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Sums of one span, one tile of E: PART = sum_n a_n^T v_n and mass sum_n phi(x_n), a = phi(x) or the rows of XR.
    WEIGHTED: row n counts FACTOR[n] in the sums and SLOPE[n] in the mass; the factor is multiplied by `gain` while it
    is a 16-bit operand."""
    tiles: tl.constexpr = (E + BE - 1) // BE
    part, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    head, half = tl.program_id(1) // HALVES, tl.program_id(1) % HALVES
    start, stop = tl.load(SPANS + 3 * part + 1), tl.load(SPANS + 3 * part + 2)
    batch, heads = tl.program_id(2).to(tl.int64), tl.num_programs(1) // HALVES
    x_at, r_at, v_at = X + batch * xb + head * xh, XR + batch * rb + head * rh, V + batch * vb + head * vh
    row_at = (batch * heads + head) * N
    rows, column, sign = tl.arange(0, BN), tl.arange(0, BD), 1.0 - 2.0 * half
    acc = tl.zeros([BD, BE], tl.float32)
    mass = tl.zeros([BD], tl.float32)
    for step in tl.range(0, (stop - start + BN - 1) // BN):
        n0 = start + step * BN
        live = rows < stop - n0
        n = n0.to(tl.int64)
        f = _features(load_tile(x_at + n * xn, rows, xn, live, 0, D, BD, BD > D), live, column, sign, D, MAP)
        if WEIGHTED:
            mass += tl.sum(f * tl.load(SLOPE + row_at + n + rows, mask=live, other=0.0)[:, None], 0)
        else:
            mass += tl.sum(f, 0)
        if DUAL:
            f = load_tile(r_at + n * rn, rows, rn, live, 0, D, BD, BD > D).to(tl.float32)
        if WEIGHTED:
            f *= tl.load(FACTOR + row_at + n + rows, mask=live, other=0.0)[:, None] * gain
        v = load_tile(v_at + n * vn, rows, vn, live, tile * BE, E, BE, E % BE != 0)
        acc = tl.dot(tl.trans(f.to(v.dtype)), v, acc, input_precision="ieee")
    if WEIGHTED:
        acc = acc / gain
    to = PART + ((batch * heads + head) * P + part) * W
    e = tile * BE + tl.arange(0, BE)
    at = to + (half * D + column)[:, None] * E + e[None, :]
    tl.store(at, acc, mask=(column < D)[:, None] & (e < E)[None, :])
    tl.store(to + HALVES * D * E + half * D + column, mass, mask=(column < D) & (tile == 0))


@_jit
def linear_scan(
    PART, GROUPS, START, GRAD, OUT, P, C, W,
    STARTED: tl.constexpr, GIVEN: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Running totals over chunks: OUT[c] = START + sum_{c' <= c} parts of c'; REVERSE: over c' >= c, and each chunk
    also adds its GRAD. Parts are added in their order, whatever else runs."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < W
    line = tl.program_id(1).to(tl.int64)
    run = tl.zeros([BLOCK], tl.float32)
    if STARTED:
        run = tl.load(START + line * W + i, mask=mask, other=0.0)
    for c in tl.range(0, C):
        chunk = c
        if REVERSE:
            chunk = C - 1 - c
        own = tl.zeros([BLOCK], tl.float32)
        for p in tl.range(tl.load(GROUPS + chunk), tl.load(GROUPS + chunk + 1)):
            own += tl.load(PART + (line * P + p) * W + i, mask=mask, other=0.0)
        if GIVEN:
            own += tl.load(GRAD + (line * C + chunk) * W + i, mask=mask, other=0.0)
        run += own
        tl.store(OUT + (line * C + chunk) * W + i, run, mask=mask)


@triton.jit
def _numerator(
    b0, b1, state, e0, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, HALVES: tl.constexpr
):
    y = _multiply(b0, _load_sums(state, e0, D, E, BD, BE), tl.zeros([b0.shape[0], BE], tl.float32))
    if HALVES == 2:
        y = _multiply(b1, _load_sums(state + D * E, e0, D, E, BD, BE), y)
    return y


@_jit
def linear_apply(
    X, XR, S, OUT, SHARE, SPANS, eps, C, W, N, xb, xh, xn, rb, rh, rn, ob, oh, on,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
    MAP: tl.constexpr, HALVES: tl.constexpr, DUAL: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """OUT = share b S for the queries of one span, b = phi(x) or the rows of XR, and SHARE, which is 1 (NORM 0),
    1 / (phi(x) z + eps) (1) or 1 / rms (2)."""
    chunk = tl.load(SPANS + 3 * tl.program_id(0))
    first, stop = tl.load(SPANS + 3 * tl.program_id(0) + 1), tl.load(SPANS + 3 * tl.program_id(0) + 2)
    head, batch, heads = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    state = S + ((batch * heads + head) * C + chunk) * W
    n = first.to(tl.int64)
    rows, column = tl.arange(0, BN), tl.arange(0, BD)
    live = rows < stop - first
    x = load_tile(X + batch * xb + head * xh + n * xn, rows, xn, live, 0, D, BD, BD > D)
    f0 = _features(x, live, column, 1.0, D, MAP)
    f1 = f0
    share = tl.full([BN], 1.0, tl.float32)
    if NORM == 1:
        z_at = state + HALVES * D * E + column
        share = tl.sum(f0 * tl.load(z_at, mask=column < D, other=0.0)[None, :], 1)
    if HALVES == 2:
        f1 = _features(x, live, column, -1.0, D, MAP)
        if NORM == 1:
            share += tl.sum(f1 * tl.load(z_at + D, mask=column < D, other=0.0)[None, :], 1)
    if NORM == 1:
        share += eps
        share = tl.where(share == 0, 0.0, 1.0 / tl.where(share == 0, 1.0, share))
    b0, b1 = f0.to(x.dtype), f1.to(x.dtype)
    if DUAL:
        b0 = load_tile(XR + batch * rb + head * rh + n * rn, rows, rn, live, 0, D, BD, BD > D)
    if NORM == 2:
        square = tl.zeros([BN], tl.float32)
        for e0 in tl.range(0, E, BE):
            y = _numerator(b0, b1, state, e0, D, E, BD, BE, HALVES)
            square += tl.sum(y * y, 1)
        share = tl.math.rsqrt(square / E + eps)
    tl.store(SHARE + (batch * heads + head) * N + n + rows, share, mask=live)
    for e0 in tl.range(0, E, BE):
        y = _numerator(b0, b1, state, e0, D, E, BD, BE, HALVES)
        store_tile(OUT + batch * ob + head * oh + n * on, rows, on, live, e0, y * share[:, None], E, BE, E % BE != 0)
