"""Softmax attention over listed key blocks, and its log-sum-exp.

Query block i of block_m tokens sees the key blocks idx[i, 0 .. cnt[i]) of block_n tokens each:

    s_ij = scale q_i . k_j + w_j        out_i = sum_j e^{s_ij} v_j / sum_j e^{s_ij}        lse_i = ln sum_j e^{s_ij}

over the keys j of those blocks; w is an optional log-weight (ln of how many tokens a key stands for) plus an optional
bias of the key's segment (EasyControl's strength, arXiv 2503.07027, as a logarithm). A list entry with mode 0 counts
whole, another one only where the element rule of _predicate.py allows it. A list of all blocks is dense attention.
A row factor and a residual can be applied to the result, out = f_i out_i + r_i: the reuse step of Re-ttention (arXiv
2505.22918), whose refresh step is dual_softmax.py. The form is that of block-sparse FlashAttention (arXiv 2205.14135, section 3.3) with the lists of
SLA (arXiv 2509.24006); a query that sees nothing gives 0 and -inf.
"""

import math

import torch

from .. import _config
from .._triton import on_gpu, triton
from ._dense import Scratch, dense
from ._forward import block_sparse_forward
from ._predicate import rule_number
from ._tiles import split_head
from .block_sparse_backward import block_sparse_backward
from .gather import attend, check_list, chunks, each_list, element_rule, outputs


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    idx: torch.Tensor,
    cnt: torch.Tensor,
    mode: torch.Tensor | None = None,
    query_coords: torch.Tensor | None = None,
    key_coords: torch.Tensor | None = None,
    key_log_weight: torch.Tensor | None = None,
    rule: str = "none",
    radius: int = 0,
    temporal_radius: int = 0,
    scale: float | None = None,
    block_m: int = 64,
    block_n: int = 64,
    segments: torch.Tensor | None = None,
    segment_bias: torch.Tensor | None = None,
    row_factor: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, Nq, D]; k, v [B, Hkv, Nk, D] with H a multiple of Hkv; any strides, one float dtype.

    idx int32 [B or 1, H or 1, nQ, W], ascending key blocks, each once; cnt int32 [B or 1, H or 1, nQ]; mode int8 or
    int32, shaped like idx, None: all whole. query_coords, key_coords int32 [Nq, 3 or 4], [Nk, 3 or 4] for rule.
    key_log_weight fp32 [Nk] or [B, Nk], natural logarithm. segments int32 [Nk], the segment of each key, with
    segment_bias fp32 [S] or [B, S], added to the logits of its keys, -inf: they are not seen. row_factor fp32
    [B, H, Nq] and residual [B, H, Nq, D] of q's dtype change out alone. -> out like q (token-major memory if q's is),
    lse fp32 [B, H, Nq] (fp64 for fp64), natural logarithm. Raises ValueError when sizes do not fit or a list does not
    ascend.
    """
    _check(q, k, v, idx, cnt, mode, query_coords, key_coords, key_log_weight, rule, block_m, block_n)
    weight = _key_bias(k, key_log_weight, segments, segment_bias)
    _check_row(q, row_factor, residual)
    (batch, heads, nq, d), (kv, nk) = q.shape, k.shape[1:3]
    out, lse = outputs(q)
    scale = d**-0.5 if scale is None else scale
    blocks = -(-nk // block_n)
    check_list(idx, cnt, blocks)
    element = element_rule(rule, query_coords, key_coords, radius, temporal_radius, mode)
    if nq == 0 or nk == 0:
        return _finish(out.zero_(), row_factor, residual), lse.fill_(-math.inf)
    least = int(cnt.min())
    if least == blocks and element is None and weight is None:
        grouped = q.unflatten(1, (kv, heads // kv)).flatten(2, 3)
        for to, got in zip((out, lse), dense(grouped, k, v, None, scale), strict=True):
            to.copy_(got.unflatten(2, (heads // kv, nq)).flatten(1, 2))
        return _finish(out, row_factor, residual), lse
    if least == 0:
        out.zero_()
        lse.fill_(-math.inf)
    scratch = Scratch()
    for b, mine, own, lists in each_list(idx, cnt, mode, element, q.shape, k.shape, (block_m, block_n)):
        parts = chunks(lists, 2 * (own.stop - own.start) * d * q.element_size())
        own_weight = None if weight is None else weight.expand(batch, nk)[b]
        target = out[b, mine], lse[b, mine], own_weight, scratch
        attend(parts, q[b, mine], k[b, own], v[b, own], scale, block_n, *target)
    return _finish(out, row_factor, residual), lse


def _finish(out: torch.Tensor, row_factor: torch.Tensor | None, residual: torch.Tensor | None) -> torch.Tensor:
    """row_factor * out + residual, in place; formed in fp32 at least."""
    if row_factor is None and residual is None:
        return out
    exact = torch.promote_types(out.dtype, torch.float32)
    full = out.to(exact) if row_factor is None else out.to(exact) * row_factor.to(exact)[..., None]
    return out.copy_(full if residual is None else full + residual)


def _key_bias(k, key_log_weight, segments, segment_bias) -> torch.Tensor | None:
    """All that is added to the logits of a key: [Nk] or [B, Nk], None: nothing."""
    if segments is None and segment_bias is None:
        return key_log_weight
    b, nk = k.shape[0], k.shape[2]
    if segments is None or segment_bias is None or segments.shape != (nk,):
        raise ValueError(
            f"A segment bias needs both segments [{nk}] and segment_bias, got {_sizes(segments, segment_bias)}."
        )
    if segment_bias.ndim not in (1, 2) or (segment_bias.ndim == 2 and segment_bias.shape[0] != b):
        raise ValueError(f"segment_bias {[*segment_bias.shape]} must be [S] or [{b}, S].")
    if (
        segments.device.type == "cpu"
        and nk
        and not 0 <= int(segments.min()) <= int(segments.max()) < segment_bias.shape[-1]
    ):
        raise ValueError(f"segments must name one of the {segment_bias.shape[-1]} segments of segment_bias, from 0.")
    bias = segment_bias.index_select(-1, segments)
    return bias if key_log_weight is None else bias + key_log_weight


def _sizes(*tensors: torch.Tensor | None) -> str:
    return " and ".join(str(None if x is None else [*x.shape]) for x in tensors)


def _check_row(q, row_factor, residual) -> None:
    for name, x, shape in (("row_factor", row_factor, q.shape[:3]), ("residual", residual, q.shape)):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} {[*x.shape]} must be {[*shape]}.")


def _check(q, k, v, idx, cnt, mode, query_coords, key_coords, key_log_weight, rule, block_m, block_n) -> None:
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(
            f"Queries {[*q.shape]}, keys {[*k.shape]} and values {[*v.shape]} must be [B, H, N, D] each, 4 dimensions."
        )
    if block_m < 1 or block_n < 1:
        raise ValueError(f"Blocks need at least 1 token, got block_m {block_m} and block_n {block_n}.")
    (b, h, nq, d), (nk, kv) = q.shape, (k.shape[2], k.shape[1])
    if k.shape != v.shape or (k.shape[0], k.shape[3]) != (b, d) or h % kv:
        raise ValueError(
            f"Queries {[*q.shape]} do not fit keys {[*k.shape]} and values {[*v.shape]}: [B, H, N, D] each."
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"Queries, keys and values need one float dtype, got {q.dtype}, {k.dtype}, {v.dtype}.")
    rows = -(-nq // block_m)
    for name, x in (("idx", idx), ("cnt", cnt), ("query_coords", query_coords), ("key_coords", key_coords)):
        if x is not None and (x.is_floating_point() or x.is_complex()):
            raise ValueError(f"{name} must hold integers, got {x.dtype}.")
    for name, x, dims in (("idx", idx, 4), ("cnt", cnt, 3)):
        if x.ndim != dims or x.shape[0] not in (1, b) or x.shape[1] not in (1, h) or x.shape[2] != rows:
            raise ValueError(
                f"{name} {[*x.shape]} must hold {rows} rows of {block_m} queries for {b} x {h} heads (or 1)."
            )
    if mode is not None and mode.shape != idx.shape:
        raise ValueError(f"mode {[*mode.shape]} must be shaped like idx {[*idx.shape]}.")
    if rule_number(rule) and mode is not None:
        for name, x, n in (("query_coords", query_coords, nq), ("key_coords", key_coords, nk)):
            if x is None or x.shape[0] != n or x.shape[1] < 3:
                raise ValueError(f"Rule {rule!r} needs {name} [{n}, 3], got {None if x is None else [*x.shape]}.")
    if key_log_weight is not None and key_log_weight.shape not in ((nk,), (b, nk)):
        raise ValueError(f"key_log_weight {[*key_log_weight.shape]} must be [{nk}] or [{b}, {nk}].")


block_sparse = torch.library.custom_op("tessera::block_sparse", reference, mutates_args=())
block_sparse.register_fake(lambda q, *_, **__: outputs(q))


def _save(ctx, inputs, output) -> None:
    q, k, v, idx, cnt, mode, query_coords, key_coords, key_log_weight, *numbers = inputs
    *ctx.numbers, segments, segment_bias, row_factor, residual = numbers
    out, lse = output
    plain = row_factor is None and residual is None
    lists = idx, cnt, mode, query_coords, key_coords, key_log_weight, segments, segment_bias
    ctx.save_for_backward(q, k, v, *lists, row_factor, out if plain else None, lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_lse):
    q, k, v, idx, cnt, mode, *coords, weight, segments, bias, row_factor, out, lse = ctx.saved_tensors
    needs = *ctx.needs_input_grad, *(False,) * 19  # inputs left at their defaults are not in it
    grad = torch.zeros_like(q) if grad is None else grad
    if out is None:  # the result of the softmax is formed again rather than kept beside what it became
        out = block_sparse(q, k, v, idx, cnt, mode, *coords, weight, *ctx.numbers, segments, bias)[0]
    factor_grad = (grad.to(lse.dtype) * out).sum(-1) if needs[17] else None
    inner = grad if row_factor is None else (grad * row_factor[..., None]).to(grad.dtype)
    added = _key_bias(k, weight, segments, bias)
    dq = dk = dv = dw = weight_grad = bias_grad = None
    if any(needs[i] for i in (0, 1, 2, 8, 16)):
        inputs = q, k, v, out, lse, idx, cnt, mode, *coords, added, *ctx.numbers
        dq, dk, dv, dw = block_sparse_backward(inner, grad_lse, *inputs)
    if needs[8]:
        weight_grad = (dw if weight.ndim == 2 else dw.sum(0)).to(weight.dtype)
    if needs[16]:
        per_batch = torch.zeros(*dw.shape[:1], bias.shape[-1], dtype=bias.dtype, device=bias.device)
        for row, of in zip(per_batch, dw, strict=True):  # accumulating index_put sorts on a GPU: no atomics
            row.index_put_((segments.long(),), of.to(bias.dtype), accumulate=True)
        bias_grad = per_batch if bias.ndim == 2 else per_batch.sum(0)
    lists = (None,) * 5
    return dq, dk, dv, *lists, weight_grad, *(None,) * 7, bias_grad, factor_grad, grad if needs[18] else None


block_sparse.register_autograd(_backward, setup_context=_save)


@on_gpu(block_sparse)
def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    idx: torch.Tensor,
    cnt: torch.Tensor,
    mode: torch.Tensor | None = None,
    query_coords: torch.Tensor | None = None,
    key_coords: torch.Tensor | None = None,
    key_log_weight: torch.Tensor | None = None,
    rule: str = "none",
    radius: int = 0,
    temporal_radius: int = 0,
    scale: float | None = None,
    block_m: int = 64,
    block_n: int = 64,
    segments: torch.Tensor | None = None,
    segment_bias: torch.Tensor | None = None,
    row_factor: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference, which serves fp64, heads above 256 and blocks that are no multiple of 16. The values of the lists
    are not read here (that would wait for the GPU): they must ascend, each block once."""
    lists = (mode, query_coords, key_coords, key_log_weight, rule, radius, temporal_radius, scale, block_m, block_n)
    (batch, heads, nq, d), nk = q.shape, k.shape[2]
    if q.dtype == torch.float64 or d > 256 or block_m % 16 or block_n % 16:
        return reference(q, k, v, idx, cnt, *lists, segments, segment_bias, row_factor, residual)
    _check(q, k, v, idx, cnt, mode, query_coords, key_coords, key_log_weight, rule, block_m, block_n)
    bias = _key_bias(k, key_log_weight, segments, segment_bias)
    _check_row(q, row_factor, residual)
    out, lse = outputs(q)
    factor = lse if row_factor is None else row_factor.float().contiguous()
    added = q if residual is None else residual.to(q.dtype)
    q, k, v, added = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v, added))
    idx, cnt = idx.int().contiguous(), cnt.int().contiguous()
    number = rule_number(rule) if mode is not None else 0
    entry_mode = idx if mode is None else mode.contiguous()
    coords = [idx if x is None else x.int().contiguous() for x in (query_coords, key_coords)]
    weight = idx if bias is None else bias.float().contiguous().expand(batch, nk)
    d0, d1 = split_head(d, 8 * q.element_size())
    tuned = _config.lookup("block_sparse", q, d0 + d1)
    bm, bn = math.gcd(block_m, tuned["tile"][0]), math.gcd(block_n, tuned["tile"][1])
    block_sparse_forward[(triton.cdiv(nq, bm), heads, batch)](
        q, k, v, out, lse, idx, cnt, entry_mode, *coords, weight, factor, added,
        d**-0.5 if scale is None else scale, nq, nk, idx.shape[3], radius, temporal_radius,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        *added.stride()[:3], *lse.stride()[:2], *_steps(idx), *_steps(cnt), coords[0].stride(0), coords[1].stride(0), weight.stride(0),
        D=d, D0=d0, D1=d1, BM=bm, BN=bn, BLOCK_M=block_m, BLOCK_N=block_n, GROUP=heads // k.shape[1], RULE=number,
        WEIGHTED=bias is not None, FACTORED=row_factor is not None,
        RESIDUAL=residual is not None, num_warps=tuned["warps"], num_stages=tuned["stages"],
    )  # fmt: skip
    return out, lse


def _steps(x: torch.Tensor) -> tuple[int, int]:
    """Batch and head strides of a list, 0 where one list serves all."""
    return (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0)


def full_lists(rows: int, blocks: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """idx [1, 1, rows, blocks] and cnt [1, 1, rows] that list every key block: dense attention."""
    idx = torch.arange(blocks, dtype=torch.int32, device=device).expand(1, 1, rows, blocks).contiguous()
    return idx, torch.full((1, 1, rows), blocks, dtype=torch.int32, device=device)


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """8 heads of 64; every query block sees itself and a tenth of the key blocks, other ones for each head."""
    q, k, v = (torch.randn(1, tokens, 8, 64, device=device).to(dtype).transpose(1, 2) for _ in range(3))
    blocks = -(-tokens // 64)
    score = torch.rand(1, 8, blocks, blocks, device=device)
    score.diagonal(dim1=2, dim2=3).fill_(2)
    idx = score.topk(max(1, blocks // 10)).indices.sort(-1).values.int()
    cnt = torch.full(idx.shape[:3], idx.shape[3], dtype=torch.int32, device=device)
    return q, k, v, idx, cnt
