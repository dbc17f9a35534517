"""The Triton kernels of ssd.py: what each chunk adds to the state, the states one after another, the outputs.

Both directions of a scan share one load of a tile. Decays arrive as vectors, [directions, B, H, C L] in fp32: the log
sums of a chunk in two parts, high and low, because a difference of two sums must be exact where the sums are large.
"""

from .._triton import tl, triton
from ..attention._tiles import load_tile, store_tile

SIZES = ["N", "C", "CN", "HEADS", "bb", "bg", "xb", "xh", "cb", "cg", "ob", "oh"]
FORWARD, REVERSE, BOTH = 0, 1, 2
_jit = triton.jit(do_not_specialize=SIZES) if hasattr(triton, "__version__") else triton.jit


@triton.jit
def state_dot(x, s, acc):
    """acc + x s for an fp32 state s. Sums over many tokens leave the range of fp16, so such a state is scaled first."""
    if x.dtype == tl.float16:
        power = tl.math.exp2(tl.ceil(tl.math.log2(tl.maximum(tl.max(tl.abs(s)), 1e-30))))
        return acc + power * tl.dot(x, (s / power).to(x.dtype))
    else:
        return tl.dot(x, s.to(x.dtype), acc, input_precision="ieee")


@triton.jit
def load_state(S, first_s, first_e, BS: tl.constexpr, BE: tl.constexpr, DS: tl.constexpr, E: tl.constexpr):
    s, e = first_s + tl.arange(0, BS), first_e + tl.arange(0, BE)
    return tl.load(S + s[:, None] * E + e[None, :], mask=(s < DS)[:, None] & (e < E)[None, :], other=0.0)


@triton.jit
def store_state(S, x, first_s, first_e, BS: tl.constexpr, BE: tl.constexpr, DS: tl.constexpr, E: tl.constexpr):
    s, e = first_s + tl.arange(0, BS), first_e + tl.arange(0, BE)
    tl.store(S + s[:, None] * E + e[None, :], x, mask=(s < DS)[:, None] & (e < E)[None, :])


@_jit
def ssd_state(
    B, X, LEAVE, PART, N, C, CN, HEADS, bb, bg, bn, xb, xh, xn,
    DS: tl.constexpr, E: tl.constexpr, L: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr,
    GROUP: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """PART[way] = sum_t leave_t B_t x_t^T of one chunk, one tile [BS, BE] of it. CN: numbers in a vector of decays."""
    tiles_s: tl.constexpr = (DS + BS - 1) // BS
    tiles_e: tl.constexpr = (E + BE - 1) // BE
    chunk, tile = tl.program_id(0) // (tiles_s * tiles_e), tl.program_id(0) % (tiles_s * tiles_e)
    s0, e0 = (tile // tiles_e) * BS, (tile % tiles_e) * BE
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    line, first = batch * HEADS + head, chunk.to(tl.int64) * L
    rows = tl.arange(0, L)
    live = rows < N - first
    b_at, x_at = B + batch * bb + (head // GROUP) * bg + first * bn, X + batch * xb + head * xh + first * xn
    b = load_tile(b_at, rows, bn, live, s0, DS, BS, DS % BS != 0)
    x = load_tile(x_at, rows, xn, live, e0, E, BE, E % BE != 0)
    for way in tl.static_range(WAYS):
        leave = tl.load(LEAVE + way * CN + line * C * L + first + rows)
        part = tl.dot(tl.trans((b.to(tl.float32) * leave[:, None]).to(x.dtype)), x, input_precision="ieee")
        to = PART + ((way * (CN // L)) + line * C + chunk) * (DS * E)
        store_state(to, part, s0, e0, BS, BE, DS, E)


@_jit
def ssd_carry(
    STATES, TOTAL, START, LAST, C, HEADS, W,
    STARTED: tl.constexpr, DIRECTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """STATES [ways, B H, C, W]: what each chunk adds becomes the state before it; LAST [ways, B H, W]. The programs of
    axis 1 are the lines B H, HEADS of them, those of axis 2 the ways."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < W
    way = tl.program_id(2)
    line = way.to(tl.int64) * HEADS + tl.program_id(1)
    run = tl.zeros([BLOCK], tl.float32)
    if STARTED:
        run = tl.load(START + line * W + i, mask=mask, other=0.0)
    for step in tl.range(0, C):
        chunk = step
        if DIRECTION == 1:
            chunk = C - 1 - step
        if DIRECTION == 2:
            chunk = tl.where(way == 1, C - 1 - step, step)
        at = STATES + (line * C + chunk) * W + i
        part = tl.load(at, mask=mask, other=0.0)
        tl.store(at, run, mask=mask)
        run = run * tl.load(TOTAL + line * C + chunk) + part
    tl.store(LAST + line * W + i, run, mask=mask)


@triton.jit
def _between(HIGH, LOW, CN, at, L: tl.constexpr, DIRECTION: tl.constexpr, DIAGONAL: tl.constexpr):
    """Decays [L (t), L (s)] between the tokens of a chunk; 0 where the scan does not lead from s to t."""
    i = tl.arange(0, L)
    t, s = i[:, None], i[None, :]
    high, low = tl.load(HIGH + at + i), tl.load(LOW + at + i)
    log = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    if DIRECTION == 0:
        log = tl.where(s <= t, log, float("-inf"))
    elif DIRECTION == 1:
        log = tl.where(s >= t, -log, float("-inf"))
    else:
        high, low = tl.load(HIGH + CN + at + i), tl.load(LOW + CN + at + i)
        back = (high[None, :] - high[:, None]) + (low[None, :] - low[:, None])
        log = tl.where(s <= t, log, back)
    decay = tl.exp(log)
    if DIAGONAL == 2:
        decay = tl.where(s == t, 2.0, decay)
    return decay


@_jit
def ssd_out(
    CC, B, X, HIGH, LOW, ENTER, STATES, OUT, scale, N, C, CN, HEADS, cb, cg, cn, bb, bg, bn, xb, xh, xn, ob, oh, on,
    DS: tl.constexpr, E: tl.constexpr, L: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr,
    GROUP: tl.constexpr, DIRECTION: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """OUT_t = scale (sum_s decay_ts (C_t . B_s) x_s + enter_t C_t S) of one chunk, BE columns of it."""
    tiles: tl.constexpr = (E + BE - 1) // BE
    chunk, e0 = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * BE
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    line, first = batch * HEADS + head, chunk.to(tl.int64) * L
    rows = tl.arange(0, L)
    live = rows < N - first
    c_at, b_at = CC + batch * cb + (head // GROUP) * cg + first * cn, B + batch * bb + (head // GROUP) * bg + first * bn
    state = STATES + (line * C + chunk) * (DS * E)
    scores = tl.zeros([L, L], tl.float32)
    y = tl.zeros([L, BE], tl.float32)
    z = tl.zeros([L, BE], tl.float32)
    for s0 in tl.range(0, DS, BS):
        c = load_tile(c_at, rows, cn, live, s0, DS, BS, DS % BS != 0)
        b = load_tile(b_at, rows, bn, live, s0, DS, BS, DS % BS != 0)
        scores = tl.dot(c, tl.trans(b), scores, input_precision="ieee")
        y = state_dot(c, load_state(state, s0, e0, BS, BE, DS, E), y)
        if DIRECTION == 2:
            z = state_dot(c, load_state(state + tl.cast(CN // L, tl.int64) * (DS * E), s0, e0, BS, BE, DS, E), z)
    at = line * C * L + first
    y *= tl.load(ENTER + at + rows)[:, None]
    if DIRECTION == 2:
        y += z * tl.load(ENTER + CN + at + rows)[:, None]
    scores *= _between(HIGH, LOW, CN, at, L, DIRECTION, DIAGONAL)
    x = load_tile(X + batch * xb + head * xh + first * xn, rows, xn, live, e0, E, BE, E % BE != 0)
    y = tl.dot(scores.to(x.dtype), x, y, input_precision="ieee") * scale
    store_tile(OUT + batch * ob + head * oh + first * on, rows, on, live, e0, y, E, BE, E % BE != 0)
