"""The Triton kernels of hierarchical_sparse.py, backward: queries tile by tile as forward, keys of one level tile by
tile over the queries that saw them."""

from .._triton import tl, triton
from ._hierarchical_forward import coarse_keys, coarse_level, fine_keys, key_weight, level_start, scores
from ._tiles import load_tile, store_tile

SIZES = ["N", "W", "size", "PART"]
_jit = triton.jit(do_not_specialize=SIZES) if hasattr(triton, "__version__") else triton.jit


@triton.jit
def _level(LSE, row, N, token, live):
    """lse [..] in base 2; +inf, which gives all weights 0, for dead rows and for those that saw nothing."""
    level = tl.load(LSE + row * N + token, mask=live, other=float("inf"))
    return tl.where(level == float("-inf"), float("inf"), level * 1.4426950408889634)


@triton.jit
def _slopes(s, level, delta, g0, g1, V, token, vn, live, scale, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Weights and gradients of the unscaled logits, both [BM, BN]."""
    p = tl.math.exp2(s - level[:, None])
    v0 = load_tile(V, token, vn, live, 0, D, D0, D0 > D)
    dp = tl.dot(g0, tl.trans(v0), input_precision="ieee")
    if D1 > 0:
        v1 = load_tile(V, token, vn, live, D0, D, D1, D0 + D1 > D)
        dp = tl.dot(g1, tl.trans(v1), dp, input_precision="ieee")
    return p, p * (dp - delta[:, None]) * scale


@triton.jit
def _add_keys(d0, d1, ds, K, token, kn, live, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    k0 = load_tile(K, token, kn, live, 0, D, D0, D0 > D)
    d0 = tl.dot(ds.to(k0.dtype), k0, d0, input_precision="ieee")
    if D1 > 0:
        k1 = load_tile(K, token, kn, live, D0, D, D1, D0 + D1 > D)
        d1 = tl.dot(ds.to(k1.dtype), k1, d1, input_precision="ieee")
    return d0, d1


@triton.jit
def _coarse(d0, d1, q0, q1, g0, g1, level, delta, K, V, kn, vn, first, rows, live_q, head, IDX, CNT, INNER, TOP, scale,
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
        _, ds = _slopes(s, level, delta, g0, g1, V + start * vn, token, vn, live, scale, D, D0, D1)
        d0, d1 = _add_keys(d0, d1, ds, K + start * kn, token, kn, live, D, D0, D1)
    return d0, d1


@_jit
def hierarchical_queries(
    Q, K, V, KC, VC, G, LSE, DELTA, DQ, IDX, CNT, INNER, TOP, scale, N, W,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, cb, ch, cn, wb, wh, wn, gb, gh, gn,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, B: tl.constexpr,
    LEVELS: tl.constexpr, GROUP: tl.constexpr, ENRICH: tl.constexpr, REWEIGHT: tl.constexpr, EXCLUDE: tl.constexpr,
):  # fmt: skip
    """Gradient of BM queries of one head. G: gradient of out; LSE, DELTA [B, H, N] and DQ contiguous."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = batch * tl.num_programs(1) + head
    first = tl.program_id(0) * BM
    rm, rn = tl.arange(0, BM), tl.arange(0, BN)
    live_q = first + rm < N
    q_at = Q + batch * qb + head * qh + first.to(tl.int64) * qn
    g_at = G + batch * gb + head * gh + first.to(tl.int64) * gn
    q0 = load_tile(q_at, rm, qn, live_q, 0, D, D0, D0 > D)
    g0 = load_tile(g_at, rm, gn, live_q, 0, D, D0, D0 > D)
    q1, g1, d0, d1 = q0, g0, tl.zeros([BM, D0], tl.float32), 0.0
    if D1 > 0:
        q1 = load_tile(q_at, rm, qn, live_q, D0, D, D1, D0 + D1 > D)
        g1 = load_tile(g_at, rm, gn, live_q, D0, D, D1, D0 + D1 > D)
        d1 = tl.zeros([BM, D1], tl.float32)
    level = _level(LSE, row, N, first + rm, live_q)
    delta = tl.load(DELTA + row * N + first + rm, mask=live_q, other=0.0)
    nodes_all = level_start(N, B, LEVELS + 1)
    idx, cnt = IDX + row * nodes_all * W, CNT + row * nodes_all
    if ENRICH:
        kc, vc = KC + batch * cb + (head // GROUP) * ch, VC + batch * wb + (head // GROUP) * wh
        for above in tl.static_range(1, LEVELS + 1):
            d0, d1 = _coarse(
                d0, d1, q0, q1, g0, g1, level, delta, kc, vc, cn, wn, first, rm, live_q, row, idx, cnt, INNER, TOP,
                scale, N, W, D, D0, D1, BN, B, above, LEVELS, REWEIGHT, EXCLUDE,
            )  # fmt: skip
    k_at, v_at = K + batch * kb + (head // GROUP) * kh, V + batch * vb + (head // GROUP) * vh
    node = first // B
    nodes = (tl.minimum(first + BM, N) - 1) // B + 1 - node
    own = (first + rm) // B - node
    none = tl.zeros([BN], tl.float32)
    steps = (W * B + BN - 1) // BN
    for step in tl.range(0, nodes * steps):
        token, live, seen = fine_keys(step, steps, rn, idx, cnt, node, own, N, W, B, BN)
        s = scores(q0, q1, k_at, token, kn, live, seen, scale, none, D, D0, D1)
        _, ds = _slopes(s, level, delta, g0, g1, v_at, token, vn, live, scale, D, D0, D1)
        d0, d1 = _add_keys(d0, d1, ds, k_at, token, kn, live, D, D0, D1)
    at = DQ + (row * N + first) * D
    store_tile(at, rm, D, live_q, 0, d0, D, D0, D0 > D)
    if D1 > 0:
        store_tile(at, rm, D, live_q, D0, d1, D, D1, D0 + D1 > D)


@triton.jit
def _who_saw(START, FLAGS, row, n0, N, W, size, PART, B: tl.constexpr, LEVEL: tl.constexpr, LEVELS: tl.constexpr):
    """Of the key at n0: row 0 of the head's flags and their width, first entry and entries of its list, and the range
    of slots of queries; of the last level, which has no lists, of this program's part of all queries."""
    if LEVEL == LEVELS:
        flags, width, begin, count = FLAGS + row * size * size, size, row, 0
        lo = tl.program_id(1) * PART
        hi = tl.minimum(lo + PART, N)
    else:
        blocks = (size + B - 1) // B
        at = START + row * (blocks + 1) + n0 // B
        first = tl.load(at)
        begin, count, lo = row * blocks * W + first, tl.load(at + 1) - first, 0
        hi = count * B ** (LEVEL + 1)
        flags, width = FLAGS + (row * level_start(N, B, LEVELS) + level_start(N, B, LEVEL)) * W * B, W * B
    return flags, width, begin, count, lo, hi


@triton.jit
def _query_rows(t, rm, ENTRY, begin, count, stop, W, SPAN: tl.constexpr, DENSE: tl.constexpr):
    """Slots t + rm of the queries of a key -> token int64 [BM], live [BM], slot of the key in their list [BM]."""
    slot = t + rm
    if DENSE:
        token = slot.to(tl.int64)
        live = slot < stop
        place = slot * 0
    else:
        held = slot // SPAN < count
        entry = tl.load(ENTRY + begin + slot // SPAN, mask=held, other=0)
        token = (entry // W).to(tl.int64) * SPAN + slot % SPAN
        live = held & (token < stop)
        place = entry % W
    return token, live, place


@_jit
def hierarchical_keys(
    Q, G, K, V, LSE, DELTA, DK, DV, START, ENTRY, FLAGS, scale, N, W, size, PART,
    qb, qh, qn, gb, gh, gn, kb, kh, kn, vb, vh, vn,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, B: tl.constexpr,
    LEVEL: tl.constexpr, LEVELS: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr,
    REWEIGHT: tl.constexpr, EXCLUDE: tl.constexpr,
):  # fmt: skip
    """Gradients of BN keys and values of one level, summed over the queries of one head that saw them; of the last
    level, which all see, over PART of them. DK, DV [parts, B H, size, D]; START, ENTRY of by_key; FLAGS of chosen_slots.
    The sums are held transposed: their rows are channels, so that the matrix units get 64 rows whatever BN is."""
    row, n0 = tl.program_id(2).to(tl.int64), tl.program_id(0) * BN
    head, batch = row % H, row // H
    rm, rn = tl.arange(0, BM), tl.arange(0, BN)
    live_k = n0 + rn < size
    DENSE: tl.constexpr = LEVEL == LEVELS
    flags, width, begin, count, lo, hi = _who_saw(START, FLAGS, row, n0, N, W, size, PART, B, LEVEL, LEVELS)
    k_at = K + batch * kb + head // GROUP * kh + n0.to(tl.int64) * kn
    v_at = V + batch * vb + head // GROUP * vh + n0.to(tl.int64) * vn
    q_at, g_at = Q + batch * qb + head * qh, G + batch * gb + head * gh
    added = tl.zeros([BN], tl.float32)
    if LEVEL > 0:  # noqa: SIM102 - both known when compiled
        if REWEIGHT:
            added = key_weight(n0 + rn, N, B**LEVEL)
    dk0, dv0, dk1, dv1 = tl.zeros([D0, BN], tl.float32), tl.zeros([D0, BN], tl.float32), 0.0, 0.0
    if D1 > 0:
        dk1, dv1 = tl.zeros([D1, BN], tl.float32), tl.zeros([D1, BN], tl.float32)
    for t in tl.range(lo, hi, BM):
        token, live, place = _query_rows(t, rm, ENTRY, begin, count, hi if DENSE else N, W, B ** (LEVEL + 1), DENSE)
        q0, g0 = load_tile(q_at, token, qn, live, 0, D, D0, D0 > D), load_tile(g_at, token, gn, live, 0, D, D0, D0 > D)
        q1, g1 = q0, g0
        if D1 > 0:
            q1 = load_tile(q_at, token, qn, live, D0, D, D1, D0 + D1 > D)
            g1 = load_tile(g_at, token, gn, live, D0, D, D1, D0 + D1 > D)
        seen = live[:, None] & live_k[None, :]
        if LEVEL > 0:  # noqa: SIM102
            if EXCLUDE:
                slot = (place * B + n0 % B)[:, None] + rn[None, :] if not DENSE else n0 + rn[None, :]
                flag = tl.load(flags + (token // (B**LEVEL))[:, None] * width + slot, mask=seen, other=1)
                seen = flag == 0
        s = scores(q0, q1, k_at, rn, kn, live_k, seen, scale, added, D, D0, D1)
        level = _level(LSE, row, N, token, live)
        delta = tl.load(DELTA + row * N + token, mask=live, other=0.0)
        p, ds = _slopes(s, level, delta, g0, g1, v_at, rn, vn, live_k, scale, D, D0, D1)
        p, ds = p.to(q0.dtype), ds.to(q0.dtype)
        dv0 = tl.dot(tl.trans(g0), p, dv0, input_precision="ieee")
        dk0 = tl.dot(tl.trans(q0), ds, dk0, input_precision="ieee")
        if D1 > 0:
            dv1 = tl.dot(tl.trans(g1), p, dv1, input_precision="ieee")
            dk1 = tl.dot(tl.trans(q1), ds, dk1, input_precision="ieee")
    to = ((tl.program_id(1) * tl.num_programs(2) + row) * size + n0) * D
    store_tile(DK + to, rn, D, live_k, 0, tl.trans(dk0), D, D0, D0 > D)
    store_tile(DV + to, rn, D, live_k, 0, tl.trans(dv0), D, D0, D0 > D)
    if D1 > 0:
        store_tile(DK + to, rn, D, live_k, D0, tl.trans(dk1), D, D1, D0 + D1 > D)
        store_tile(DV + to, rn, D, live_k, D0, tl.trans(dv1), D, D1, D0 + D1 > D)
