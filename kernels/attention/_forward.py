"""The Triton kernel of block_sparse.py, forward."""

from .._triton import tl, triton
from ._predicate import places, rule_allows
from ._specs import argument_kinds, head_specs
from ._tiles import dot_heads, load_head, softmax_step, store_head, zero_head

# Sizes that differ between resolutions are plain numbers: one compilation serves all of them.
SIZES = ["NQ", "NK", "W", "lb", "lh", "ib", "ih", "cb", "ch", "wb"]
_jit = triton.jit(do_not_specialize=SIZES) if hasattr(triton, "__version__") else triton.jit


@triton.jit
def ruled(s, tq, yq, xq, KC, n, kcn, live, R, RT, RULE: tl.constexpr):
    """The tile without the pairs that the rule refuses."""
    tk, yk, xk = places(KC, n, kcn, live)
    return tl.where(rule_allows(tq, yq, xq, tk, yk, xk, R, RT, RULE), s, float("-inf"))


@_jit
def block_sparse_forward(
    Q, K, V, OUT, LSE, IDX, CNT, MODE, QC, KC, WEIGHT, FACTOR, ADDED, scale, NQ, NK, W, R, RT,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, ob, oh, on, rb, rh, rr, lb, lh, ib, ih, cb, ch, qcn, kcn, wb,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, RULE: tl.constexpr, WEIGHTED: tl.constexpr,
    FACTORED: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """One tile of BM queries of one head. A list block has PARTS key tiles, and BLOCK_M / BM programs share a list."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * BM
    row = first // BLOCK_M
    rm, rn = tl.arange(0, BM), tl.arange(0, BN)
    live_q = first + rm < NQ
    q_at = Q + batch * qb + head * qh + first.to(tl.int64) * qn
    q0, q1 = load_head(q_at, rm, qn, live_q, D, D0, D1)
    out0, out1 = zero_head(BM, D0, D1)
    if RULE > 0:
        tq, yq, xq = places(QC, first + rm, qcn, live_q)
    k_head = K + batch * kb + (head // GROUP) * kh
    v_head = V + batch * vb + (head // GROUP) * vh
    entries = batch * ib + head * ih + row.to(tl.int64) * W
    PARTS: tl.constexpr = BLOCK_N // BN
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for step in tl.range(0, tl.load(CNT + batch * cb + head * ch + row) * PARTS):
        slot = entries + step // PARTS
        n0 = tl.load(IDX + slot) * BLOCK_N + (step % PARTS) * BN
        live = rn < NK - n0
        k0, k1 = load_head(k_head + n0.to(tl.int64) * kn, rn, kn, live, D, D0, D1)
        s = dot_heads(q0, q1, k0, k1, D1) * (scale * 1.4426950408889634)
        if WEIGHTED:
            s += (tl.load(WEIGHT + batch * wb + n0 + rn, mask=live, other=0.0) * 1.4426950408889634)[None, :]
        if RULE > 0:  # noqa: SIM102 - known when compiled; the inner one is not
            if tl.load(MODE + slot) != 0:
                s = ruled(s, tq, yq, xq, KC, n0 + rn, kcn, live, R, RT, RULE)
        p, shrink, top, total = softmax_step(tl.where(live[None, :], s, float("-inf")), top, total)
        v0, v1 = load_head(v_head + n0.to(tl.int64) * vn, rn, vn, live, D, D0, D1)
        out0 = tl.dot(p.to(v0.dtype), v0, out0 * shrink[:, None], input_precision="ieee")
        if D1 > 0:
            out1 = tl.dot(p.to(v1.dtype), v1, out1 * shrink[:, None], input_precision="ieee")
    seen = total > 0  # else the sums are 0 already
    total = tl.where(seen, total, 1.0)
    share = 1.0 / total
    if FACTORED:
        share *= tl.load(FACTOR + batch * lb + head * lh + first + rm, mask=live_q, other=0.0)
    share = share[:, None]
    out0, out1 = out0 * share, out1 * share
    if RESIDUAL:
        r_at = ADDED + batch * rb + head * rh + first.to(tl.int64) * rr
        r0, r1 = load_head(r_at, rm, rr, live_q, D, D0, D1)
        out0 += r0.to(tl.float32)
        if D1 > 0:
            out1 += r1.to(tl.float32)
    o_at = OUT + batch * ob + head * oh + first.to(tl.int64) * on
    store_head(o_at, rm, on, live_q, out0, out1, D, D0, D1)
    level = tl.where(seen, (top + tl.math.log2(total)) * 0.6931471805599453, float("-inf"))
    tl.store(LSE + batch * lb + head * lh + first + rm, level, mask=live_q)


def aot_specs() -> list[dict]:
    """Compilations for bench/aot.py."""
    kinds = argument_kinds(
        ("Q", "K", "V", "OUT", "ADDED"),
        ("LSE", "WEIGHT", "FACTOR"),
        "qb qh kb kh vb vh ob oh rb rh lb lh ib ih cb ch wb",
        "NQ NK W R RT qn kn vn on rr qcn kcn",
    ) | {"IDX": "*i32", "CNT": "*i32"}
    flags = ("RULE", "WEIGHTED", "FACTORED", "RESIDUAL")
    everything, nothing = dict.fromkeys(flags, 1), dict.fromkeys(flags, 0)
    variants = [("circle", "bf16", everything), ("whole blocks", "bf16", nothing), ("circle", "fp32", everything)]
    unaligned = (*SIZES, "R", "RT", "qcn", "kcn")
    return head_specs("block_sparse_forward", "block_sparse", kinds, variants, unaligned, small=3)
