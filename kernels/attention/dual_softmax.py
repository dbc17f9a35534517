"""Attention twice over the same keys in one pass: over all of them, and over the subset that block lists name.

    out_full = softmax(s) v, lse_full over all keys        out, lse over the listed keys alone, as block_sparse gives

The refresh step of Re-ttention (arXiv 2505.22918): e^{lse - lse_full} is the share of the softmax that the subset
holds, and out_full - e^{lse - lse_full} out what the others add; both are kept for the reuse steps (row_factor and
residual of block_sparse.py).

The kernel walks the listed blocks first and stores that result, then goes on with the same running softmax over all
other blocks, and over the pairs that the rule refuses in the blocks where it decides: dense attention's work and
registers, plus a second look at those blocks.
"""

import math

import torch

from .. import _config
from .._triton import on_gpu, tl, triton
from ._dense import dense
from ._forward import SIZES, ruled
from ._predicate import places, rule_allows, rule_number
from ._specs import argument_kinds, head_specs
from ._tiles import dot_heads, load_head, softmax_step, split_head, store_head, zero_head
from .block_sparse import _check, _steps
from .block_sparse import reference as listed
from .gather import like, outputs

Both = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    idx: torch.Tensor,
    cnt: torch.Tensor,
    mode: torch.Tensor | None = None,
    query_coords: torch.Tensor | None = None,
    key_coords: torch.Tensor | None = None,
    rule: str = "none",
    radius: int = 0,
    temporal_radius: int = 0,
    scale: float | None = None,
    block_m: int = 64,
    block_n: int = 64,
) -> Both:
    """Inputs as block_sparse's, in the same layouts. -> out_full like q and lse_full fp32 [B, H, Nq] (fp64 for fp64)
    over all keys; out and lse alike over the listed ones (0 and -inf where that is none). Raises ValueError when sizes
    do not fit or a list does not ascend."""
    lists = idx, cnt, mode, query_coords, key_coords, None, rule, radius, temporal_radius, scale, block_m, block_n
    out, lse = listed(q, k, v, *lists)
    (heads, d), kv = (q.shape[1], q.shape[3]), k.shape[1]
    full = outputs(q)
    grouped = q.unflatten(1, (kv, heads // kv)).flatten(2, 3)
    scale = d**-0.5 if scale is None else scale
    for to, got in zip(full, dense(grouped, k, v, None, scale), strict=True):
        to.copy_(got.unflatten(2, (heads // kv, -1)).flatten(1, 2))
    return *full, out, lse


DUAL_SIZES = [x for x in SIZES if x != "wb"]
_jit = triton.jit(do_not_specialize=DUAL_SIZES) if hasattr(triton, "__version__") else triton.jit


@triton.jit
def _step(
    q0, q1, out0, out1, top, total, K, V, n0, kn, vn, NK, scale, tq, yq, xq, KC, kcn, R, RT, decides,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BN: tl.constexpr, RULE: tl.constexpr, REFUSED: tl.constexpr,
):  # fmt: skip
    """One key tile into the running softmax. decides: only the pairs that the rule allows or, if REFUSED, refuses."""
    rn = tl.arange(0, BN)
    live = rn < NK - n0
    k0, k1 = load_head(K + tl.cast(n0, tl.int64) * kn, rn, kn, live, D, D0, D1)
    s = dot_heads(q0, q1, k0, k1, D1) * (scale * 1.4426950408889634)
    if RULE > 0:  # noqa: SIM102 - known when compiled; the inner one is not
        if decides:
            if REFUSED:
                tk, yk, xk = places(KC, n0 + rn, kcn, live)
                s = tl.where(rule_allows(tq, yq, xq, tk, yk, xk, R, RT, RULE), float("-inf"), s)
            else:
                s = ruled(s, tq, yq, xq, KC, n0 + rn, kcn, live, R, RT, RULE)
    p, shrink, top, total = softmax_step(tl.where(live[None, :], s, float("-inf")), top, total)
    v0, v1 = load_head(V + tl.cast(n0, tl.int64) * vn, rn, vn, live, D, D0, D1)
    out0 = tl.dot(p.to(v0.dtype), v0, out0 * shrink[:, None], input_precision="ieee")
    if D1 > 0:
        out1 = tl.dot(p.to(v1.dtype), v1, out1 * shrink[:, None], input_precision="ieee")
    return out0, out1, top, total


@triton.jit
def _store(
    OUT, LSE, rm, on, live, out0, out1, top, total, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr
):  # fmt: skip
    """The running softmax as it stands; the sums go on."""
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    share = (1.0 / total)[:, None]
    store_head(OUT, rm, on, live, out0 * share, out1 * share, D, D0, D1)
    level = tl.where(seen, (top + tl.math.log2(total)) * 0.6931471805599453, float("-inf"))
    tl.store(LSE + rm, level, mask=live)


@_jit
def dual_softmax_kernel(
    Q, K, V, FULL, FULL_LSE, OUT, LSE, IDX, CNT, MODE, QC, KC, scale, NQ, NK, W, R, RT,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, ob, oh, on, lb, lh, ib, ih, cb, ch, qcn, kcn,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """One tile of BM queries of one head."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * BM
    row = first // BLOCK_M
    rm = tl.arange(0, BM)
    live = first + rm < NQ
    q0, q1 = load_head(Q + batch * qb + head * qh + first.to(tl.int64) * qn, rm, qn, live, D, D0, D1)
    out0, out1 = zero_head(BM, D0, D1)
    tq, yq, xq = rm, rm, rm
    if RULE > 0:
        tq, yq, xq = places(QC, first + rm, qcn, live)
    k_head = K + batch * kb + (head // GROUP) * kh
    v_head = V + batch * vb + (head // GROUP) * vh
    entries = batch * ib + head * ih + row.to(tl.int64) * W
    count = tl.load(CNT + batch * cb + head * ch + row)
    PARTS: tl.constexpr = BLOCK_N // BN
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for step in tl.range(0, count * PARTS):
        slot = entries + step // PARTS
        n0 = tl.load(IDX + slot) * BLOCK_N + (step % PARTS) * BN
        decides = False
        if RULE > 0:
            decides = tl.load(MODE + slot) != 0
        out0, out1, top, total = _step(
            q0, q1, out0, out1, top, total, k_head, v_head, n0, kn, vn, NK, scale, tq, yq, xq, KC, kcn, R, RT, decides,
            D, D0, D1, BN, RULE, False,
        )  # fmt: skip
    o_at = batch * ob + head * oh + first.to(tl.int64) * on
    l_at = batch * lb + head * lh + first
    _store(OUT + o_at, LSE + l_at, rm, on, live, out0, out1, top, total, D, D0, D1)
    for gap in tl.range(0, count + 1):  # from one listed block to the next; a block where the rule decides opens it
        low, partly = 0, -1
        if gap > 0:
            low = tl.load(IDX + entries + gap - 1) + 1
            if RULE > 0:  # noqa: SIM102 - known when compiled; the inner one is not
                if tl.load(MODE + entries + gap - 1) != 0:
                    low, partly = low - 1, low - 1
        high = tl.cdiv(NK, BLOCK_N)
        if gap < count:
            high = tl.load(IDX + entries + gap)
        for step in tl.range(low * PARTS, high * PARTS):
            out0, out1, top, total = _step(
                q0, q1, out0, out1, top, total, k_head, v_head, step * BN, kn, vn, NK, scale, tq, yq, xq, KC, kcn, R,
                RT, step // PARTS == partly, D, D0, D1, BN, RULE, True,
            )  # fmt: skip
    _store(FULL + o_at, FULL_LSE + l_at, rm, on, live, out0, out1, top, total, D, D0, D1)


def _fake(q: torch.Tensor, *_, **__) -> Both:
    return *outputs(q), *outputs(q)


dual_softmax = torch.library.custom_op("tessera::dual_softmax", reference, mutates_args=())
dual_softmax.register_fake(_fake)


@on_gpu(dual_softmax)
def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    idx: torch.Tensor,
    cnt: torch.Tensor,
    mode: torch.Tensor | None = None,
    query_coords: torch.Tensor | None = None,
    key_coords: torch.Tensor | None = None,
    rule: str = "none",
    radius: int = 0,
    temporal_radius: int = 0,
    scale: float | None = None,
    block_m: int = 64,
    block_n: int = 64,
) -> Both:
    """As reference, which serves what the launcher of block_sparse leaves to its own. Values of lists are not read."""
    (batch, heads, nq, d), nk = q.shape, k.shape[2]
    if q.dtype == torch.float64 or d > 256 or block_m % 16 or block_n % 16:
        lists = idx, cnt, mode, query_coords, key_coords, rule, radius, temporal_radius, scale, block_m, block_n
        return reference(q, k, v, *lists)
    _check(q, k, v, idx, cnt, mode, query_coords, key_coords, None, rule, block_m, block_n)
    (full, full_lse), out = outputs(q), like(q)
    lse = torch.empty_like(full_lse)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    idx, cnt = idx.int().contiguous(), cnt.int().contiguous()
    entry_mode = idx if mode is None else mode.contiguous()
    coords = [idx if x is None else x.int().contiguous() for x in (query_coords, key_coords)]
    d0, d1 = split_head(d, 8 * q.element_size())
    tuned = _config.lookup("dual_softmax", q, d0 + d1)
    bm, bn = math.gcd(block_m, tuned["tile"][0]), math.gcd(block_n, tuned["tile"][1])
    dual_softmax_kernel[(triton.cdiv(nq, bm), heads, batch)](
        q, k, v, full, full_lse, out, lse, idx, cnt, entry_mode, *coords, d**-0.5 if scale is None else scale, nq, nk,
        idx.shape[3], radius, temporal_radius, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        *lse.stride()[:2], *_steps(idx), *_steps(cnt), coords[0].stride(0), coords[1].stride(0),
        D=d, D0=d0, D1=d1, BM=bm, BN=bn, BLOCK_M=block_m, BLOCK_N=block_n, GROUP=heads // k.shape[1],
        RULE=rule_number(rule) if mode is not None else 0, num_warps=tuned["warps"], num_stages=tuned["stages"],
    )  # fmt: skip
    return full, full_lse, out, lse


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """8 heads of 64; the subset is a band of the neighbouring blocks."""
    q, k, v = (torch.randn(1, tokens, 8, 64, device=device).to(dtype).transpose(1, 2) for _ in range(3))
    blocks = -(-tokens // 64)
    row, width = torch.arange(blocks, device=device)[:, None], min(3, blocks)
    idx = (row - 1).clamp(0, blocks - width) + torch.arange(width, device=device)
    return q, k, v, idx.int()[None, None], torch.full((1, 1, blocks), width, dtype=torch.int32, device=device)


def aot_specs() -> list[dict]:
    """Compilations for bench/aot.py."""
    kinds = argument_kinds(
        ("Q", "K", "V", "FULL", "OUT"),
        ("FULL_LSE", "LSE"),
        "qb qh kb kh vb vh ob oh lb lh ib ih cb ch",
        "NQ NK W R RT qn kn vn on qcn kcn",
    ) | {"IDX": "*i32", "CNT": "*i32"}
    variants = [("band", "bf16", {"RULE": 3}), ("whole blocks", "bf16", {"RULE": 0}), ("band", "fp32", {"RULE": 3})]
    unaligned = (*DUAL_SIZES, "R", "RT", "qcn", "kcn")
    return head_specs("dual_softmax_kernel", "dual_softmax", kinds, variants, unaligned, small=1)
