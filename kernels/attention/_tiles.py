"""Device functions that the attention kernels share: loads of a head whose size is no power of two, online softmax."""

from .._triton import tl, triton


def split_head(d: int, bits: int = 16) -> tuple[int, int]:
    """Head size -> widths (first, second) of the two column tiles, powers of two from 16; second 0: one tile is
    enough. 72 is 64 + 16 and not 128, 112 is 128. fp32 is never split: its products hold so many registers that two
    tiles spill."""
    first = max(16, 1 << (d.bit_length() - 1))
    if first >= d:
        return first, 0
    second = max(16, 1 << (d - first - 1).bit_length())
    return (first, second) if second < first and bits < 32 else (2 * first, 0)


@triton.jit
def load_tile(X, rows, stride, live, first, D: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows of X, columns first .. first + WIDTH; zeros where not live and, if PADDED, from column D on."""
    d = first + tl.arange(0, WIDTH)
    at = X + rows[:, None] * stride + d[None, :]
    if PADDED:
        return tl.load(at, mask=live[:, None] & (d < D)[None, :], other=0.0)
    return tl.load(at, mask=live[:, None], other=0.0)


@triton.jit
def store_tile(X, rows, stride, live, first, x, D: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    d = first + tl.arange(0, WIDTH)
    at = X + rows[:, None] * stride + d[None, :]
    x = x.to(X.dtype.element_ty)
    if PADDED:
        tl.store(at, x, mask=live[:, None] & (d < D)[None, :])
    else:
        tl.store(at, x, mask=live[:, None])


@triton.jit
def softmax_step(s, top, total):
    """One tile of base-2 logits s [M, N] into the running maximum and sum [M] -> weights, factor by which earlier sums
    shrink, new maximum, new sum. A row that has seen only -inf keeps maximum -inf and sum 0."""
    new = tl.maximum(top, tl.max(s, 1))
    finite = tl.where(new == float("-inf"), 0.0, new)
    p = tl.math.exp2(s - finite[:, None])
    shrink = tl.math.exp2(top - finite)
    return p, shrink, new, total * shrink + tl.sum(p, 1)


@triton.jit
def load_head(X, rows, stride, live, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Both column tiles of some rows; the second is the first again where the head is not split."""
    x0 = load_tile(X, rows, stride, live, 0, D, D0, D0 > D)
    x1 = x0
    if D1 > 0:
        x1 = load_tile(X, rows, stride, live, D0, D, D1, D0 + D1 > D)
    return x0, x1


@triton.jit
def dot_heads(a0, a1, b0, b1, D1: tl.constexpr):
    """a b^T [M, N] of two split heads, fp32."""
    s = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if D1 > 0:
        s = tl.dot(a1, tl.trans(b1), s, input_precision="ieee")
    return s


@triton.jit
def zero_head(M: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Sums [M, D] of a split head; the second part is the first again where the head is not split."""
    x0 = tl.zeros([M, D0], tl.float32)
    x1 = x0
    if D1 > 0:
        x1 = tl.zeros([M, D1], tl.float32)
    return x0, x1


@triton.jit
def store_head(X, rows, stride, live, x0, x1, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    store_tile(X, rows, stride, live, 0, x0, D, D0, D0 > D)
    if D1 > 0:
        store_tile(X, rows, stride, live, D0, x1, D, D1, D0 + D1 > D)
