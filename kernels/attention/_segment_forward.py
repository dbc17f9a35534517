"""The Triton kernel of segment_bias.py."""

from .._triton import tl, triton
from ._specs import head_specs
from ._tiles import dot_heads, load_head, softmax_step, store_head, zero_head

MOST = 9  # segments, whose ends are plain arguments: a list in memory would be one more copy to the GPU a call
ENDS = [f"e{i}" for i in range(MOST)]
SIZES = ["NQ", "COUNT", "FIRST", "SPLIT", "HKV", *ENDS]
_jit = triton.jit(do_not_specialize=SIZES) if hasattr(triton, "__version__") else triton.jit


@triton.jit
def _end(i, e0, e1, e2, e3, e4, e5, e6, e7, e8):
    low = tl.where(i == 0, e0, tl.where(i == 1, e1, tl.where(i == 2, e2, e3)))
    high = tl.where(i == 4, e4, tl.where(i == 5, e5, tl.where(i == 6, e6, tl.where(i == 7, e7, e8))))
    return tl.where(i < 4, low, high)


@triton.jit
def _wide(x, dtype: tl.constexpr):
    """Bits of e4m3 -> their value / 256, exactly: those of fp16 have four more of exponent range and three spare."""
    bits = x.to(tl.uint16)
    bits = ((bits & 128) << 8) | ((bits & 127) << 7)
    return bits.to(tl.float16, bitcast=True).to(tl.float32).to(dtype)


@triton.jit
def _segment(
    q0, q1, out0, out1, top, total, K, V, first, last, kn, vn, factor, added,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BN: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    """Keys first .. last of one head into the running softmax; logits are factor q k + added in base 2."""
    rn = tl.arange(0, BN)
    for step in tl.range(0, tl.cdiv(last - first, BN)):
        n0 = first + step * BN
        live = rn < last - n0
        k0, k1 = load_head(K + tl.cast(n0, tl.int64) * kn, rn, kn, live, D, D0, D1)
        if EIGHT:
            k0, k1 = _wide(k0, q0.dtype), _wide(k1, q0.dtype)
        s = dot_heads(q0, q1, k0, k1, D1) * factor + added
        p, shrink, top, total = softmax_step(tl.where(live[None, :], s, float("-inf")), top, total)
        v0, v1 = load_head(V + tl.cast(n0, tl.int64) * vn, rn, vn, live, D, D0, D1)
        if EIGHT:
            v0, v1 = _wide(v0, q0.dtype), _wide(v1, q0.dtype)
        out0 = tl.dot(p.to(v0.dtype), v0, out0 * shrink[:, None], input_precision="ieee")
        if D1 > 0:
            out1 = tl.dot(p.to(v1.dtype), v1, out1 * shrink[:, None], input_precision="ieee")
    return out0, out1, top, total


@_jit
def segment_forward(
    Q, K, V, OUT, BIAS, K8, V8, K_SCALE, V_SCALE, scale, NQ, COUNT, FIRST, SPLIT, HKV, e0, e1, e2, e3, e4, e5, e6, e7, e8,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, ob, oh, on, xb, xh, xn, yb, yh, yn,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
    EIGHT: tl.constexpr,
):  # fmt: skip
    """One tile of BM queries of one head. BIAS [B, COUNT]; segments 0 .. FIRST lie in K and V, which hold SPLIT keys,
    and (EIGHT) the others in K8 and V8, e4m3 bits with one scale a head, [B, HKV]."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * BM
    rm = tl.arange(0, BM)
    live = first + rm < NQ
    q0, q1 = load_head(Q + batch * qb + head * qh + first.to(tl.int64) * qn, rm, qn, live, D, D0, D1)
    out0, out1 = zero_head(BM, D0, D1)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    own, low = head // GROUP, 0
    factor = scale * 1.4426950408889634
    for i in tl.range(0, FIRST):
        high = _end(i, e0, e1, e2, e3, e4, e5, e6, e7, e8)
        added = tl.load(BIAS + batch * COUNT + i) * 1.4426950408889634
        out0, out1, top, total = _segment(
            q0, q1, out0, out1, top, total, K + batch * kb + own * kh, V + batch * vb + own * vh,
            low, tl.where(added == float("-inf"), low, high), kn, vn, factor, added, D, D0, D1, BN, False,
        )  # fmt: skip
        low = high
    if EIGHT:
        factor *= 256.0 * tl.load(K_SCALE + batch * HKV + own)
        unit = 256.0 * tl.load(V_SCALE + batch * HKV + own)
        unit = tl.where(unit == 0.0, 1.0, unit)
        out0, out1 = out0 / unit, out1 / unit  # sums go on in units of these values
        for i in tl.range(FIRST, COUNT):
            high = _end(i, e0, e1, e2, e3, e4, e5, e6, e7, e8)
            added = tl.load(BIAS + batch * COUNT + i) * 1.4426950408889634
            out0, out1, top, total = _segment(
                q0, q1, out0, out1, top, total, K8 + batch * xb + own * xh, V8 + batch * yb + own * yh, low - SPLIT,
                tl.where(added == float("-inf"), low, high) - SPLIT, xn, yn, factor, added, D, D0, D1, BN, True,
            )  # fmt: skip
            low = high
        out0, out1 = out0 * unit, out1 * unit
    share = (1.0 / tl.where(total > 0, total, 1.0))[:, None]  # what saw nothing is 0
    o_at = OUT + batch * ob + head * oh + first.to(tl.int64) * on
    store_head(o_at, rm, on, live, out0 * share, out1 * share, D, D0, D1)


def aot_specs() -> list[dict]:
    """Compilations for bench/aot.py."""
    kinds = dict.fromkeys(("Q", "K", "V", "OUT"), "*{}") | dict.fromkeys(("BIAS", "K_SCALE", "V_SCALE"), "*fp32")
    kinds |= {"K8": "*u8", "V8": "*u8", "scale": "fp32"} | dict.fromkeys(SIZES, "i32")
    for name in "qkvoxy":
        kinds |= {f"{name}b": "i64", f"{name}h": "i64", f"{name}n": "i32"}
    eight = head_specs(
        "segment_forward", "segment_bias_fp8", kinds, [("fp8 beside", "bf16", {"EIGHT": True})], tuple(SIZES), small=1
    )
    plain = [(words, words, {"EIGHT": False}) for words in ("bf16", "fp32")]
    return eight + head_specs("segment_forward", "segment_bias", kinds, plain, tuple(SIZES), small=1)
