"""The Triton kernels that only the backward pass of linear attention needs."""

from .._triton import tl, triton
from ..attention._tiles import load_tile, store_tile
from ._kernels import SIZES, _chain, _features, _load_sums, _multiply

_jit = triton.jit(do_not_specialize=SIZES) if hasattr(triton, "__version__") else triton.jit


@_jit
def linear_rows(
    G, OUT, SHARE, SLOPE, H, N, xb, xh, xn, ob, oh, on, zb, zh, zn,
    E: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """What each query's normaliser passes back. NORM 1: SLOPE = -share g . out, the gradient of phi(q) z; NORM 2:
    H = g - out mean(g out), so that share H is the gradient of the numerator. Else SLOPE = 0."""
    head, batch, heads = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    n = tl.program_id(0).to(tl.int64) * BN
    rows = tl.arange(0, BN)
    live = rows < N - n
    row_at = (batch * heads + head) * N + n + rows
    slope = tl.zeros([BN], tl.float32)
    if NORM > 0:
        g = load_tile(G + batch * xb + head * xh + n * xn, rows, xn, live, 0, E, BE, BE > E).to(tl.float32)
        out = load_tile(OUT + batch * ob + head * oh + n * on, rows, on, live, 0, E, BE, BE > E).to(tl.float32)
        dot = tl.sum(g * out, 1)
        if NORM == 1:
            slope = -dot * tl.load(SHARE + row_at, mask=live, other=0.0)
        else:
            h = g - out * (dot / E)[:, None]
            store_tile(H + batch * zb + head * zh + n * zn, rows, zn, live, 0, h, E, BE, BE > E)
    tl.store(SLOPE + row_at, slope, mask=live)


@_jit
def linear_gradient(
    X, V, S, FACTOR, SLOPE, DX, DXR, SPANS, C, W, N, xb, xh, xn, vb, vh, vn, ob, oh, on, rb, rh, rn,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
    MAP: tl.constexpr, HALVES: tl.constexpr, DUAL: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Gradient of x, where phi(x) (or, DUAL, the rows of XR, whose gradient is DXR) was multiplied by S and phi(x) by
    the mass z: phi'(x) (factor V S^T + slope z); factor and slope are 1 unless WEIGHTED."""
    chunk = tl.load(SPANS + 3 * tl.program_id(0))
    first, stop = tl.load(SPANS + 3 * tl.program_id(0) + 1), tl.load(SPANS + 3 * tl.program_id(0) + 2)
    head, batch, heads = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    state = S + ((batch * heads + head) * C + chunk) * W
    n = first.to(tl.int64)
    rows, column = tl.arange(0, BN), tl.arange(0, BD)
    live = rows < stop - first
    v_at = V + batch * vb + head * vh + n * vn
    row_at = (batch * heads + head) * N + n + rows
    dx = tl.zeros([BN, BD], tl.float32)
    for half in tl.static_range(HALVES):
        sign = 1.0 - 2.0 * half
        g = tl.zeros([BN, BD], tl.float32)
        for e0 in tl.range(0, E, BE):
            v = load_tile(v_at, rows, vn, live, e0, E, BE, E % BE != 0)
            g = _multiply(v, tl.trans(_load_sums(state + half * D * E, e0, D, E, BD, BE)), g)
        if WEIGHTED:
            g *= tl.load(FACTOR + row_at, mask=live, other=0.0)[:, None]
        if DUAL:
            store_tile(DXR + batch * rb + head * rh + n * rn, rows, rn, live, 0, g, D, BD, BD > D)
            g = tl.zeros([BN, BD], tl.float32)
        z = tl.load(state + HALVES * D * E + half * D + column, mask=column < D, other=0.0)[None, :]
        if WEIGHTED:
            g += z * tl.load(SLOPE + row_at, mask=live, other=0.0)[:, None]
        else:
            g += z
        x = load_tile(X + batch * xb + head * xh + n * xn, rows, xn, live, 0, D, BD, BD > D)
        dx += _chain(g, x, _features(x, live, column, sign, D, MAP), sign, MAP)
    store_tile(DX + batch * ob + head * oh + n * on, rows, on, live, 0, dx, D, BD, BD > D)
