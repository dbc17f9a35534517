"""The Triton kernel of hierarchical_sparse.py, forward, and what its gradients share: which keys a tile of queries
meets in the step at slot t, one function for the fine level and one for the coarse ones."""

from .._triton import tl, triton
from ._tiles import load_tile, softmax_step, store_tile

SIZES = ["N", "W", "lb", "lh"]
_jit = triton.jit(do_not_specialize=SIZES) if hasattr(triton, "__version__") else triton.jit


@triton.jit
def level_size(N, B: tl.constexpr, LEVEL: tl.constexpr):
    """N_LEVEL."""
    size = N
    for _ in tl.static_range(LEVEL):
        size = (size + B - 1) // B
    return size


@triton.jit
def level_start(N, B: tl.constexpr, LEVEL: tl.constexpr):
    """First row of LEVEL where the levels from 1 on lie one behind the other."""
    size, start = N, tl.full([], 0, tl.int32)
    for _ in tl.static_range(LEVEL - 1):
        size = (size + B - 1) // B
        start += size
    return start


@triton.jit
def key_weight(token, N, SPAN: tl.constexpr):
    """log2 of the tokens that a node of SPAN stands for."""
    held = tl.minimum(N - token * SPAN, SPAN)
    return tl.math.log2(tl.maximum(held, 1).to(tl.float32))


@triton.jit
def fine_keys(step, steps, rn, IDX, CNT, first_node, own, N, W, B: tl.constexpr, BN: tl.constexpr):
    """Step of the lists of consecutive level 1 nodes, `steps` tiles each -> token int64 [BN], live [BN], seen [BM, BN] by
    the rows whose node, counted from first_node, is own [BM]. IDX, CNT point at the head's row 0."""
    node, slot = step // steps, step % steps * BN + rn
    held = slot // B < tl.load(CNT + first_node + node)
    listed = tl.load(IDX + (first_node + node).to(tl.int64) * W + slot // B, mask=held, other=0)
    token = listed.to(tl.int64) * B + slot % B
    live = held & (token < N)
    return token, live, (own == node)[:, None] & live[None, :]


@triton.jit
def coarse_keys(t, rn, IDX, count, FLAGS, node, live_q, width, size,
                B: tl.constexpr, DENSE: tl.constexpr, EXCLUDE: tl.constexpr):  # fmt: skip
    """Slots t + rn of the one list at IDX, or of all `size` nodes -> token int64 [BN], live [BN], seen [BM or 1, BN].
    node int64 [BM]: row of FLAGS of each query; width: slots of such a row."""
    slot = t + rn
    if DENSE:
        token = slot.to(tl.int64)
        live = slot < size
    else:
        held = slot // B < count
        token = tl.load(IDX + slot // B, mask=held, other=0).to(tl.int64) * B + slot % B
        live = held & (token < size)
    seen = live[None, :]
    if EXCLUDE:
        flag = tl.load(FLAGS + node[:, None] * width + slot[None, :], mask=live_q[:, None] & seen, other=1)
        seen = flag == 0
    return token, live, seen


@triton.jit
def coarse_level(first, rows, head, IDX, CNT, INNER, TOP, N, W,
                 B: tl.constexpr, LEVEL: tl.constexpr, LEVELS: tl.constexpr):  # fmt: skip
    """Of a tile at token `first`: list, its length in slots (of the last level: all nodes), row 0 of the flags, row of
    each query in them, their width, N_LEVEL. IDX, CNT as in fine_keys; head int64 counts over batch and heads."""
    size = level_size(N, B, LEVEL)
    start = level_start(N, B, LEVEL)
    node = ((first + rows) // (B**LEVEL)).to(tl.int64)
    if LEVEL == LEVELS:
        at, slots, flags, width = IDX, size, TOP + head * size * size, size
    else:
        above = start + size + first // (B ** (LEVEL + 1))
        at, slots, width = IDX + above.to(tl.int64) * W, tl.load(CNT + above) * B, W * B
        flags = INNER + (head * level_start(N, B, LEVELS) + start) * width
    return at, slots, flags, node, width, size


@triton.jit
def scores(q0, q1, K, token, kn, live, seen, scale, added, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Logits of one tile in base 2, scaled in fp32 after the product; -inf where not seen."""
    k0 = load_tile(K, token, kn, live, 0, D, D0, D0 > D)
    s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    if D1 > 0:
        k1 = load_tile(K, token, kn, live, D0, D, D1, D0 + D1 > D)
        s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
    return tl.where(seen, s * (scale * 1.4426950408889634) + added[None, :], float("-inf"))


@triton.jit
def _attend(out0, out1, top, total, s, V, token, vn, live, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """One tile of logits into the running softmax."""
    p, shrink, top, total = softmax_step(s, top, total)
    v0 = load_tile(V, token, vn, live, 0, D, D0, D0 > D)
    out0 = tl.dot(p.to(v0.dtype), v0, out0 * shrink[:, None], input_precision="ieee")
    if D1 > 0:
        v1 = load_tile(V, token, vn, live, D0, D, D1, D0 + D1 > D)
        out1 = tl.dot(p.to(v1.dtype), v1, out1 * shrink[:, None], input_precision="ieee")
    return out0, out1, top, total


@triton.jit
def _coarse(out0, out1, top, total, q0, q1, K, V, kn, vn, first, rows, live_q, head, IDX, CNT, INNER, TOP, scale,
            N, W, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BN: tl.constexpr, B: tl.constexpr,
            LEVEL: tl.constexpr, LEVELS: tl.constexpr, REWEIGHT: tl.constexpr, EXCLUDE: tl.constexpr):  # fmt: skip
    """All keys of a coarse level. K, V point at row 0 of level 1."""
    rn = tl.arange(0, BN)
    start = level_start(N, B, LEVEL).to(tl.int64)
    at, slots, flags, node, width, size = coarse_level(first, rows, head, IDX, CNT, INNER, TOP, N, W, B, LEVEL, LEVELS)
    DENSE: tl.constexpr = LEVEL == LEVELS
    for t in tl.range(0, slots, BN):
        token, live, seen = coarse_keys(t, rn, at, slots // B, flags, node, live_q, width, size, B, DENSE, EXCLUDE)
        added = tl.zeros([BN], tl.float32)
        if REWEIGHT:
            added = key_weight(token, N, B**LEVEL)
        s = scores(q0, q1, K + start * kn, token, kn, live, seen, scale, added, D, D0, D1)
        out0, out1, top, total = _attend(out0, out1, top, total, s, V + start * vn, token, vn, live, D, D0, D1)
    return out0, out1, top, total


@_jit
def hierarchical_forward(
    Q, K, V, KC, VC, OUT, LSE, IDX, CNT, INNER, TOP, scale, N, W,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, cb, ch, cn, wb, wh, wn, ob, oh, on, lb, lh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, B: tl.constexpr,
    LEVELS: tl.constexpr, GROUP: tl.constexpr, ENRICH: tl.constexpr, REWEIGHT: tl.constexpr, EXCLUDE: tl.constexpr,
):  # fmt: skip
    """BM queries of one head. Strides k of K, v of V, c of KC, w of VC; IDX, CNT, INNER, TOP contiguous."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = batch * tl.num_programs(1) + head
    first = tl.program_id(0) * BM
    rm, rn = tl.arange(0, BM), tl.arange(0, BN)
    live_q = first + rm < N
    q_at = Q + batch * qb + head * qh + first.to(tl.int64) * qn
    q0 = load_tile(q_at, rm, qn, live_q, 0, D, D0, D0 > D)
    q1, out0, out1 = q0, tl.zeros([BM, D0], tl.float32), 0.0
    if D1 > 0:
        q1 = load_tile(q_at, rm, qn, live_q, D0, D, D1, D0 + D1 > D)
        out1 = tl.zeros([BM, D1], tl.float32)
    k_at, v_at = K + batch * kb + (head // GROUP) * kh, V + batch * vb + (head // GROUP) * vh
    nodes_all = level_start(N, B, LEVELS + 1)
    idx, cnt = IDX + row * nodes_all * W, CNT + row * nodes_all
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    if ENRICH:
        kc, vc = KC + batch * cb + (head // GROUP) * ch, VC + batch * wb + (head // GROUP) * wh
        for level in tl.static_range(1, LEVELS + 1):
            out0, out1, top, total = _coarse(
                out0, out1, top, total, q0, q1, kc, vc, cn, wn, first, rm, live_q, row, idx, cnt, INNER, TOP, scale,
                N, W, D, D0, D1, BN, B, level, LEVELS, REWEIGHT, EXCLUDE,
            )  # fmt: skip
    node = first // B
    nodes = (tl.minimum(first + BM, N) - 1) // B + 1 - node
    own = (first + rm) // B - node
    none = tl.zeros([BN], tl.float32)
    steps = (W * B + BN - 1) // BN
    for step in tl.range(0, nodes * steps):
        token, live, seen = fine_keys(step, steps, rn, idx, cnt, node, own, N, W, B, BN)
        s = scores(q0, q1, k_at, token, kn, live, seen, scale, none, D, D0, D1)
        out0, out1, top, total = _attend(out0, out1, top, total, s, v_at, token, vn, live, D, D0, D1)
    some = total > 0  # else the sums are 0 already
    total = tl.where(some, total, 1.0)
    share = (1.0 / total)[:, None]
    o_at = OUT + batch * ob + head * oh + first.to(tl.int64) * on
    store_tile(o_at, rm, on, live_q, 0, out0 * share, D, D0, D0 > D)
    if D1 > 0:
        store_tile(o_at, rm, on, live_q, D0, out1 * share, D, D1, D0 + D1 > D)
    level = tl.where(some, (top + tl.math.log2(total)) * 0.6931471805599453, float("-inf"))
    tl.store(LSE + batch * lb + head * lh + first + rm, level, mask=live_q)
