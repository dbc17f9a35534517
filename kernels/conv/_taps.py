"""The Triton kernels of depthwise_conv.py."""

from .._triton import tl, triton
from ._activation import activated, activated_slope

BN, BC = 16, 64  # tokens and channels of one program
SIZES = ["N", "W", "C", "xb", "yb", "gb", "SPLIT"]
_jit = triton.jit(do_not_specialize=SIZES) if hasattr(triton, "__version__") else triton.jit


@triton.jit
def _shifted(X, n, tap, c, N, W, C, xn, K: tl.constexpr):
    """Rows of X at each token's neighbour number `tap` of the K x K window, fp32 [BN, BC]; 0 outside the grid."""
    dy, dx = tap // K - K // 2, tap % K - K // 2
    column = n % W + dx
    other = n + dy * W + dx
    live = (n < N) & (column >= 0) & (column < W) & (n // W + dy >= 0) & (n // W + dy < N // W)
    mask = live[:, None] & (c < C)[None, :]
    return tl.load(X + other.to(tl.int64)[:, None] * xn + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _convolved(X, WEIGHT, BIAS, n, c, N, W, C, xn, K: tl.constexpr, FLIP: tl.constexpr, BIASED: tl.constexpr,
               BN: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """sum over taps of weight [K K, C] times neighbour, + bias; FLIP: the taps in reverse order."""
    acc = tl.zeros([BN, BC], tl.float32)
    for row in tl.range(0, K):
        for place in tl.static_range(K):  # one row of taps at once: a whole window would spill
            tap = row * K + place
            at = tap
            if FLIP:
                at = K * K - 1 - tap
            w = tl.load(WEIGHT + at * C + c, mask=c < C, other=0.0).to(tl.float32)
            acc += w[None, :] * _shifted(X, n, tap, c, N, W, C, xn, K)
    if BIASED:
        acc += tl.load(BIAS + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    return acc


@_jit
def depthwise(
    X, WEIGHT, BIAS, G, Y, N, W, C, xb, xn, gb, gn, yb, yn,
    K: tl.constexpr, KIND: tl.constexpr, GLU: tl.constexpr, FLIP: tl.constexpr, BIASED: tl.constexpr,
    GRAD: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Y = act(conv X), or (GLU) the first half of conv X times act of the second half; C counts output channels.
    GRAD: Y is the gradient of conv X instead, from G, that of the result."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    batch = tl.program_id(2).to(tl.int64)
    total = C
    if GLU:
        total = 2 * C
    x = X + batch * xb
    mask = (n < N)[:, None] & (c < C)[None, :]
    y_at = Y + batch * yb + n.to(tl.int64)[:, None] * yn + c[None, :]
    last = c
    if GLU:
        last = tl.where(c < C, c + C, total)
    p = _convolved(x, WEIGHT, BIAS, n, last, N, W, total, xn, K, FLIP, BIASED, BN, BC)
    if GLU:
        a = _convolved(x, WEIGHT, BIAS, n, tl.where(c < C, c, total), N, W, total, xn, K, FLIP, BIASED, BN, BC)
    if GRAD:
        g = tl.load(G + batch * gb + n.to(tl.int64)[:, None] * gn + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if GLU:
            tl.store(y_at, (g * activated(p, KIND)).to(Y.dtype.element_ty), mask=mask)
            tl.store(y_at + C, (g * a * activated_slope(p, KIND)).to(Y.dtype.element_ty), mask=mask)
        else:
            tl.store(y_at, (g * activated_slope(p, KIND)).to(Y.dtype.element_ty), mask=mask)
    else:
        y = activated(p, KIND)
        if GLU:
            y = a * y
        tl.store(y_at, y.to(Y.dtype.element_ty), mask=mask)


@_jit
def depthwise_weight(
    X, G, PART, N, W, C, SPLIT, xb, xn, gb, gn, K: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """PART [B splits, K K + 1, C]: this program's share of the gradient of one tap, or (tap K K) of the bias. The token
    tiles first .. first + SPLIT of one batch item are one split."""
    splits = tl.num_programs(0) // (K * K + 1)
    tap, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    batch = tl.program_id(2).to(tl.int64)
    acc = tl.zeros([BN, BC], tl.float32)
    for step in tl.range(0, SPLIT):
        n = (split * SPLIT + step) * BN + tl.arange(0, BN)
        mask = (n < N)[:, None] & (c < C)[None, :]
        g = tl.load(G + batch * gb + n.to(tl.int64)[:, None] * gn + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if tap < K * K:
            g *= _shifted(X + batch * xb, n, tap, c, N, W, C, xn, K)
        acc += g
    at = PART + ((batch * splits + split) * (K * K + 1) + tap) * C + c
    tl.store(at, tl.sum(acc, 0), mask=c < C)
