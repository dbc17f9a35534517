"""The Triton kernels of block_sparse_backward.py. With P = e^{s - lse}, dP = dO V^T and dS = P (dP - delta):

    dQ = scale dS K        dK = scale dS^T Q        dV = P^T dO        dw_j = sum_i dS_ij

delta_i = dO_i . O_i - dlse_i (FlashAttention-2, arXiv 2307.08691, section 3.1.2; the last term is the gradient of lse).
The first kernel walks the lists and leaves delta for the second, which walks the transposed lists: every sum has one
owner and one order.
"""

from .._triton import tl, triton
from ._forward import SIZES, ruled
from ._predicate import places, rule_allows
from ._specs import argument_kinds, head_specs
from ._tiles import dot_heads, load_head, split_head, store_head, zero_head

_jit_dq = triton.jit(do_not_specialize=SIZES) if hasattr(triton, "__version__") else triton.jit
SIZES_DKV = ["NQ", "NK", "LENGTH", "lb", "lh", "mb", "mh", "fb", "fh", "wb", "ub", "uh"]
_jit_dkv = triton.jit(do_not_specialize=SIZES_DKV) if hasattr(triton, "__version__") else triton.jit


def split_wide(d: int, bits: int) -> tuple[int, int]:
    """split_head for the backward kernels, which hold too much to split heads above 128 as well."""
    return split_head(d, bits if d <= 128 else 32)


@_jit_dq
def block_sparse_dq(
    Q, K, V, OUT, DOUT, LSE, DLSE, DELTA, DQ, IDX, CNT, MODE, QC, KC, WEIGHT, scale, NQ, NK, W, R, RT,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, ob, oh, on, gb, gh, gn, xb, xh, xn, lb, lh, ib, ih, cb, ch, qcn, kcn, wb,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, RULE: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """One tile of BM queries of one head, as the forward kernel. Writes DELTA [B, H, Nq] too."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * BM
    row = first // BLOCK_M
    rm, rn = tl.arange(0, BM), tl.arange(0, BN)
    live_q = first + rm < NQ
    start = first.to(tl.int64)
    g0, g1 = load_head(DOUT + batch * gb + head * gh + start * gn, rm, gn, live_q, D, D0, D1)
    o0, o1 = load_head(OUT + batch * ob + head * oh + start * on, rm, on, live_q, D, D0, D1)
    delta = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)
    if D1 > 0:
        delta += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
    level_at = batch * lb + head * lh + first + rm
    delta -= tl.load(DLSE + level_at, mask=live_q, other=0.0)
    tl.store(DELTA + level_at, delta, mask=live_q)
    level = tl.load(LSE + level_at, mask=live_q, other=float("-inf")) * 1.4426950408889634
    level = tl.where(level == float("-inf"), float("inf"), level)  # who sees nothing gives nothing back
    q0, q1 = load_head(Q + batch * qb + head * qh + start * qn, rm, qn, live_q, D, D0, D1)
    if RULE > 0:
        tq, yq, xq = places(QC, first + rm, qcn, live_q)
    k_head = K + batch * kb + (head // GROUP) * kh
    v_head = V + batch * vb + (head // GROUP) * vh
    entries = batch * ib + head * ih + row.to(tl.int64) * W
    PARTS: tl.constexpr = BLOCK_N // BN
    dq0, dq1 = zero_head(BM, D0, D1)
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
        p = tl.math.exp2(tl.where(live[None, :], s, float("-inf")) - level[:, None])
        v0, v1 = load_head(v_head + n0.to(tl.int64) * vn, rn, vn, live, D, D0, D1)
        ds = (p * (dot_heads(g0, g1, v0, v1, D1) - delta[:, None])).to(k0.dtype)
        dq0 = tl.dot(ds, k0, dq0, input_precision="ieee")
        if D1 > 0:
            dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")
    store_head(DQ + batch * xb + head * xh + start * xn, rm, xn, live_q, dq0 * scale, dq1 * scale, D, D0, D1)


@_jit_dkv
def block_sparse_dkv(
    Q, K, V, DOUT, LSE, DELTA, DK, DV, DWEIGHT, OFFSETS, ROWS, POSITION, MODE, QC, KC, WEIGHT, scale, NQ, NK, LENGTH,
    R, RT, qb, qh, qn, kb, kh, kn, vb, vh, vn, gb, gh, gn, xb, xh, xn, yb, yh, yn, lb, lh, mb, mh, fb, fh, qcn, kcn,
    wb, ub, uh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, RULE: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """One tile of BN keys of one key head: sums over the queries that list it, of all GROUP heads in turn. Tiles are
    [BN, BM], so that no product needs a transposed accumulator. fb, fh: strides of OFFSETS [B, H, blocks + 1];
    a head's ROWS and POSITION hold LENGTH entries and stand where its OFFSETS do."""
    kv_head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * BN
    rm, rn = tl.arange(0, BM), tl.arange(0, BN)
    live = first + rn < NK
    start = first.to(tl.int64)
    k0, k1 = load_head(K + batch * kb + kv_head * kh + start * kn, rn, kn, live, D, D0, D1)
    v0, v1 = load_head(V + batch * vb + kv_head * vh + start * vn, rn, vn, live, D, D0, D1)
    dk0, dk1 = zero_head(BN, D0, D1)
    dv0, dv1 = zero_head(BN, D0, D1)
    if WEIGHTED:
        weight = tl.load(WEIGHT + batch * wb + first + rn, mask=live, other=0.0) * 1.4426950408889634
        dw = tl.zeros([BN], tl.float32)
    if RULE > 0:
        tk, yk, xk = places(KC, first + rn, kcn, live)
    PARTS: tl.constexpr = BLOCK_M // BM
    for member in range(GROUP):
        head = kv_head * GROUP + member
        head_list = batch * fb + head * fh  # which of the lists, counted in lists
        offset = head_list * (tl.cdiv(NK, BLOCK_N) + 1) + first // BLOCK_N
        low, high = tl.load(OFFSETS + offset), tl.load(OFFSETS + offset + 1)
        q_head, g_head = Q + batch * qb + head * qh, DOUT + batch * gb + head * gh
        levels = batch * lb + head * lh
        for step in tl.range(low * PARTS, high * PARTS):
            slot = head_list * LENGTH + step // PARTS
            m0 = tl.load(ROWS + slot) * BLOCK_M + (step % PARTS) * BM
            live_q = rm < NQ - m0
            q0, q1 = load_head(q_head + m0.to(tl.int64) * qn, rm, qn, live_q, D, D0, D1)
            level = tl.load(LSE + levels + m0 + rm, mask=live_q, other=float("-inf")) * 1.4426950408889634
            level = tl.where(level == float("-inf"), float("inf"), level)
            s = dot_heads(k0, k1, q0, q1, D1) * (scale * 1.4426950408889634)
            if WEIGHTED:
                s += weight[:, None]
            if RULE > 0:  # noqa: SIM102 - known when compiled; the inner one is not
                if tl.load(MODE + batch * mb + head * mh + tl.load(POSITION + slot)) != 0:
                    tq, yq, xq = places(QC, m0 + rm, qcn, live_q)
                    s = tl.where(rule_allows(tk, yk, xk, tq, yq, xq, R, RT, RULE), s, float("-inf"))
            p = tl.math.exp2(s - level[None, :])
            g0, g1 = load_head(g_head + m0.to(tl.int64) * gn, rm, gn, live_q, D, D0, D1)
            weights = p.to(g0.dtype)
            dv0 = tl.dot(weights, g0, dv0, input_precision="ieee")
            if D1 > 0:
                dv1 = tl.dot(weights, g1, dv1, input_precision="ieee")
            delta = tl.load(DELTA + levels + m0 + rm, mask=live_q, other=0.0)
            ds = p * (dot_heads(v0, v1, g0, g1, D1) - delta[None, :])
            if WEIGHTED:
                dw += tl.sum(ds, 1)
            dk0 = tl.dot(ds.to(q0.dtype), q0, dk0, input_precision="ieee")
            if D1 > 0:
                dk1 = tl.dot(ds.to(q0.dtype), q1, dk1, input_precision="ieee")
    store_head(DK + batch * xb + kv_head * xh + start * xn, rn, xn, live, dk0 * scale, dk1 * scale, D, D0, D1)
    store_head(DV + batch * yb + kv_head * yh + start * yn, rn, yn, live, dv0, dv1, D, D0, D1)
    if WEIGHTED:
        tl.store(DWEIGHT + batch * ub + kv_head * uh + first + rn, dw, mask=live)


def aot_specs() -> list[dict]:
    """Compilations for bench/aot.py."""
    flags = ("RULE", "WEIGHTED")
    everything, nothing = dict.fromkeys(flags, 1), dict.fromkeys(flags, 0)
    variants = [("circle", "bf16", everything), ("whole blocks", "bf16", nothing), ("circle", "fp32", everything)]
    dq = argument_kinds(
        ("Q", "K", "V", "OUT", "DOUT", "DQ"),
        ("LSE", "DLSE", "DELTA", "WEIGHT"),
        "qb qh kb kh vb vh ob oh gb gh xb xh lb lh ib ih cb ch wb",
        "NQ NK W R RT qn kn vn on gn xn qcn kcn",
    ) | {"IDX": "*i32", "CNT": "*i32"}
    dkv = argument_kinds(
        ("Q", "K", "V", "DOUT", "DK", "DV"),
        ("LSE", "DELTA", "DWEIGHT", "WEIGHT"),
        "qb qh kb kh vb vh gb gh xb xh yb yh lb lh mb mh fb fh wb ub uh",
        "NQ NK LENGTH R RT qn kn vn gn xn yn qcn kcn",
    ) | dict.fromkeys(("OFFSETS", "ROWS", "POSITION"), "*i32")
    loose = ("R", "RT", "qcn", "kcn")
    return [
        *head_specs("block_sparse_dq", "block_sparse_dq", dq, variants, (*SIZES, *loose), split_wide),
        *head_specs("block_sparse_dkv", "block_sparse_dkv", dkv, variants, (*SIZES_DKV, *loose), split_wide),
    ]
