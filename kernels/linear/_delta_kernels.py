"""The Triton kernels of delta_rule.py: what each value takes from the ones before it (A), T = (1 + A)^-1, its products
with values and keys, and the pass over the chunks. The outputs are those of _ssd_kernels.py.

T is found by forward substitution in blocks of 16 and then block by block. Series such as (1 - A)(1 + A^2)(1 + A^4) ..
are shorter, but for keys that resemble each other the powers of A hold numbers that fp32 cannot add up to T.
"""

from .._triton import tl, triton
from ..attention._tiles import load_tile, store_tile
from ._ssd_kernels import load_state, state_dot, store_state

SIZES = ["N", "C", "HEADS", "kb", "kh", "xb", "xh"]
_jit = triton.jit(do_not_specialize=SIZES) if hasattr(triton, "__version__") else triton.jit


@_jit
def delta_taken(
    K, BETA, HIGH, LOW, A, N, C, HEADS, kb, kh, kn,
    D: tl.constexpr, L: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A [B, H, C, L, L]: beta_t exp(g_t - g_s) k_t . k_s for s < t in one chunk, else 0."""
    chunk, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    part = (batch * HEADS + head) * C + chunk
    first = chunk.to(tl.int64) * L
    rows = tl.arange(0, L)
    live = rows < N - first
    k_at = K + batch * kb + head * kh + first * kn
    a = tl.zeros([L, L], tl.float32)
    for d0 in tl.range(0, D, BD):
        k = load_tile(k_at, rows, kn, live, d0, D, BD, D % BD != 0)
        a = tl.dot(k, tl.trans(k), a, input_precision="ieee")
    high, low = tl.load(HIGH + part * L + rows), tl.load(LOW + part * L + rows)
    log = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    decay = tl.exp(tl.where(rows[None, :] < rows[:, None], log, float("-inf")))
    a *= decay * tl.load(BETA + part * L + rows)[:, None]
    tl.store(A + part * (L * L) + rows[:, None] * L + rows[None, :], a)


@triton.jit
def _block(A, row, column, L: tl.constexpr):
    i = tl.arange(0, 16)
    return tl.load(A + (16 * row + i)[:, None] * L + (16 * column + i)[None, :])


@triton.jit
def _put(T, x, row, column, L: tl.constexpr):
    i = tl.arange(0, 16)
    tl.store(T + (16 * row + i)[:, None] * L + (16 * column + i)[None, :], x)


@triton.jit
def _substitute(A, t, row, block, L: tl.constexpr):
    """One more row of (1 + A)^-1 of a diagonal block [16, 16]: e_row minus A's row times the rows before it."""
    i = tl.arange(0, 16)
    a = tl.load(A + (16 * block + row) * L + 16 * block + i)
    return tl.where(i[:, None] == row, t - tl.sum(a[:, None] * t, 0)[None, :], t)


@triton.jit
def _times(x, y):
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def delta_inverse(A, T, L: tl.constexpr):
    """T = (1 + A)^-1 of one chunk, [L, L] each, L = 32 or 64; the upper half is written as zeros."""
    at = tl.program_id(0).to(tl.int64) * (L * L)
    A += at
    T += at
    zero = tl.zeros([16, 16], tl.float32)
    i = tl.arange(0, 16)
    t0 = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    t1 = t0
    t2 = t0
    t3 = t0
    for row in tl.range(1, 16):
        t0, t1 = _substitute(A, t0, row, 0, L), _substitute(A, t1, row, 1, L)
        if L == 64:
            t2, t3 = _substitute(A, t2, row, 2, L), _substitute(A, t3, row, 3, L)
    t10 = -_times(t1, _times(_block(A, 1, 0, L), t0))
    _put(T, t0, 0, 0, L)
    _put(T, t1, 1, 1, L)
    _put(T, t10, 1, 0, L)
    _put(T, zero, 0, 1, L)
    if L == 64:
        a21, a32 = _block(A, 2, 1, L), _block(A, 3, 2, L)
        t21, t32 = -_times(t2, _times(a21, t1)), -_times(t3, _times(a32, t2))
        t20 = -_times(t2, _times(_block(A, 2, 0, L), t0) + _times(a21, t10))
        a31 = _block(A, 3, 1, L)
        t31 = -_times(t3, _times(a31, t1) + _times(a32, t21))
        t30 = -_times(t3, _times(_block(A, 3, 0, L), t0) + _times(a31, t10) + _times(a32, t20))
        for column in tl.static_range(2):
            _put(T, zero, column, 2, L)
            _put(T, zero, column, 3, L)
        _put(T, zero, 2, 3, L)
        _put(T, t2, 2, 2, L)
        _put(T, t3, 3, 3, L)
        _put(T, t21, 2, 1, L)
        _put(T, t32, 3, 2, L)
        _put(T, t20, 2, 0, L)
        _put(T, t31, 3, 1, L)
        _put(T, t30, 3, 0, L)


@_jit
def delta_prepare(
    T, X, WEIGHT, OUT, N, C, HEADS, xb, xh, xn,
    E: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """OUT [B, H, N, E] = T (weight_t x_t) of one chunk, BE columns of it. A 16-bit product takes T in two parts, which
    together hold twice its precision."""
    tiles: tl.constexpr = (E + BE - 1) // BE
    chunk, e0 = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * BE
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    line, first = batch * HEADS + head, chunk.to(tl.int64) * L
    rows, inner = tl.arange(0, L), tl.arange(0, BK)
    x_at = X + batch * xb + head * xh + first * xn
    t_at = T + (line * C + chunk) * (L * L)
    y = tl.zeros([L, BE], tl.float32)
    for s0 in tl.range(0, L, BK):
        t = tl.load(t_at + rows[:, None] * L + (s0 + inner)[None, :])
        x = load_tile(x_at, s0 + inner, xn, s0 + inner < N - first, e0, E, BE, E % BE != 0)
        weighted = (x.to(tl.float32) * tl.load(WEIGHT + line * C * L + first + s0 + inner)[:, None]).to(x.dtype)
        if x.dtype == tl.float32:
            y = tl.dot(t, weighted, y, input_precision="ieee")
        else:
            high = t.to(x.dtype)
            y = tl.dot((t - high.to(tl.float32)).to(x.dtype), weighted, y)
            y = tl.dot(high, weighted, y)
    store_tile(OUT + (line * N + first) * E, rows, E, rows < N - first, e0, y, E, BE, E % BE != 0)


@_jit
def delta_carry(
    K, PER, OWN, LEAVE, TOTAL, START, STATES, W, LAST, N, C, HEADS, kb, kh, kn,
    D: tl.constexpr, E: tl.constexpr, L: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BE: tl.constexpr,
    STARTED: tl.constexpr,
):  # fmt: skip
    """Chunk after chunk, BE columns of the state: STATES gets the state S before each chunk, W = OWN - PER S, LAST the
    state behind the last one. PER [B, H, N, D], OWN and W [B, H, N, E], states [D, E] in two parts of rows."""
    e0 = tl.program_id(0) * BE
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    line = batch * HEADS + head
    rows = tl.arange(0, L)
    k_at = K + batch * kb + head * kh
    s0, s1 = tl.zeros([D0, BE], tl.float32), 0.0
    if D1 > 0:
        s1 = tl.zeros([D1, BE], tl.float32)
    if STARTED:
        s0 = load_state(START + line * (D * E), 0, e0, D0, BE, D, E)
        if D1 > 0:
            s1 = load_state(START + line * (D * E), D0, e0, D1, BE, D, E)
    for chunk in tl.range(0, C):
        live = rows < N - chunk * L
        token, state = line * N + chunk * L, STATES + (line * C + chunk) * (D * E)
        store_state(state, s0, 0, e0, D0, BE, D, E)
        per = load_tile(PER + token * D, rows, D, live, 0, D, D0, D0 > D)
        taken = state_dot(per, s0, tl.zeros([L, BE], tl.float32))
        if D1 > 0:
            store_state(state, s1, D0, e0, D1, BE, D, E)
            per = load_tile(PER + token * D, rows, D, live, D0, D, D1, D0 + D1 > D)
            taken = state_dot(per, s1, taken)
        w = load_tile(OWN + token * E, rows, E, live, e0, E, BE, E % BE != 0).to(tl.float32) - taken
        store_tile(W + token * E, rows, E, live, e0, w, E, BE, E % BE != 0)
        leave, total = tl.load(LEAVE + (line * C + chunk) * L + rows), tl.load(TOTAL + line * C + chunk)
        k = load_tile(k_at, rows, kn, live, 0, D, D0, D0 > D)
        left = tl.trans((k.to(tl.float32) * leave[:, None]).to(k.dtype))
        s0 = tl.dot(left, w.to(k.dtype), s0 * total, input_precision="ieee")
        if D1 > 0:
            k = load_tile(k_at, rows, kn, live, D0, D, D1, D0 + D1 > D)
            left = tl.trans((k.to(tl.float32) * leave[:, None]).to(k.dtype))
            s1 = tl.dot(left, w.to(k.dtype), s1 * total, input_precision="ieee")
        k_at += L * kn
    store_state(LAST + line * (D * E), s0, 0, e0, D0, BE, D, E)
    if D1 > 0:
        store_state(LAST + line * (D * E), s1, D0, e0, D1, BE, D, E)
