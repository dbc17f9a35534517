"""Gradients of block_sparse.py: with P_ij = e^{s_ij - lse_i} over the listed pairs, dP = dO V^T and dS_ij = P_ij (dP_ij -
dO_i . O_i + dlse_i),

    dQ = scale dS K        dK = scale dS^T Q        dV = P^T dO        dw_j = sum_i dS_ij

dK and dV sum over all query heads that share a key head. P is formed again from lse, so memory stays linear
(FlashAttention-2, arXiv 2307.08691, section 3.1.2; the lists as in SLA, arXiv 2509.24006, but transposed instead of
scanned, see transpose_lists.py). Triton runs one kernel over the lists for dQ, one over the transposed lists for the
rest: no atomics, the same bits in every run.
"""

import math
from collections.abc import Iterable

import torch

from .. import _config
from .._triton import on_gpu, triton
from ._backward import block_sparse_dkv, block_sparse_dq, split_wide
from ._predicate import rule_number
from .gather import Chunk, chunks, each_list, element_rule, gather, like, rows_of
from .transpose_lists import transpose_lists

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def reference(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
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
) -> Gradients:
    """grad like out [B, H, Nq, D] and grad_lse like lse [B, H, Nq] or None: gradients of the loss with respect to the
    outputs of block_sparse, whose inputs follow. -> dq like q, dk and dv like k and v (token-major memory where those
    are); gradient of key_log_weight per batch entry [B, Nk] (fp32, fp64 for fp64), [B, 0] without one. Products are in
    fp32, fp64 for fp64. Raises ValueError when grad does not fit out."""
    _check(grad, grad_lse, out, lse)
    batch, nk, d = q.shape[0], k.shape[2], q.shape[3]
    scale = d**-0.5 if scale is None else scale
    exact = lse.dtype
    delta = (grad.to(exact) * out.to(exact)).sum(-1)
    if grad_lse is not None:
        delta -= grad_lse
    dq, dk, dv = (torch.zeros(x.shape, dtype=exact, device=x.device) for x in (q, k, v))
    dw = torch.zeros(batch, 0 if key_log_weight is None else nk, dtype=exact, device=q.device)
    element = element_rule(rule, query_coords, key_coords, radius, temporal_radius, mode)
    for b, mine, own, lists in each_list(idx, cnt, mode, element, q.shape, k.shape, (block_m, block_n)):
        weight = None if key_log_weight is None else key_log_weight.expand(batch, nk)[b]
        parts = chunks(lists, 4 * (own.stop - own.start) * d * dq.element_size())
        inputs = q[b, mine], k[b, own], v[b, own], grad[b, mine], lse[b, mine], delta[b, mine], weight
        _descend(parts, inputs, scale, block_n, (dq[b, mine], dk[b, own], dv[b, own], dw[b]))
    return like(q).copy_(dq), like(k).copy_(dk), like(v).copy_(dv), dw


def _descend(parts: Iterable[Chunk], inputs, scale: float, unit: int, sums) -> None:
    """Adds what the chunks give to sums = dq [H, Nq, D], dk and dv [Hkv, Nk, D], dw [Nk or 0], for one batch entry."""
    q, k, v, grad, lse, delta, weight = inputs
    dq, dk, dv, dw = sums
    exact, d, kv = lse.dtype, q.shape[-1], k.shape[0]
    group = q.shape[0] // kv
    queries = [rows_of(x, 1) for x in (q, grad, lse[..., None], delta[..., None])]
    keys = [rows_of(x, unit) for x in (k, v)]
    weights = None if weight is None else rows_of(weight[None, :, None], unit)
    padded = [torch.zeros(x.shape, dtype=exact, device=q.device) for x in keys]
    padded_w = None if weights is None else torch.zeros(weights.shape, dtype=exact, device=q.device)
    for part in parts:
        qs, gs, ls, ds = (
            gather(x, part.queries, part.rows, width).unflatten(1, (kv, group)).flatten(2, 3).to(exact)
            for x, width in zip(queries, (d, d, 1, 1), strict=True)
        )
        ls = ls.masked_fill(ls.isneginf(), math.inf)
        if part.real is not None:  # the last token again, to fill the block, must not count again
            repeated = torch.ones(part.queries.shape[0], dtype=torch.bool, device=q.device)
            repeated[part.real] = False
            repeated = repeated.view(part.rows, 1, 1, -1, 1).expand(-1, -1, group, -1, -1).flatten(2, 3)
            ls = ls.masked_fill(repeated, math.inf)
        ks, vs = (gather(x, part.keys, part.rows, d).to(exact) for x in keys)
        share = (qs @ ks.transpose(-1, -2)).mul_(scale)
        if part.bias is not None:
            share += (part.bias if part.bias.shape[1] == 1 else part.bias.repeat(1, group, 1))[:, None]
        if weights is not None:
            share += gather(weights, part.keys, part.rows, 1).transpose(-1, -2)
        share.sub_(ls).exp_()
        slope = (gs @ vs.transpose(-1, -2)).sub_(ds).mul_(share)
        rows = (slope @ ks).mul_(scale).unflatten(2, (group, -1)).flatten(1, 2).transpose(0, 1).flatten(1, 2)
        if part.real is None:
            dq.index_copy_(1, part.queries, rows)
        else:
            dq.index_copy_(1, part.queries[part.real], rows.index_select(1, part.real))
        for to, x in zip(padded, (slope.transpose(-1, -2) @ qs, share.transpose(-1, -2) @ gs), strict=True):
            to.index_add_(1, part.keys, x.transpose(0, 1).reshape(kv, -1, unit * d))
        if padded_w is not None:
            padded_w.index_add_(1, part.keys, slope.sum((1, 2)).view(1, -1, unit))
    for to, x, factor in ((dk, padded[0], scale), (dv, padded[1], 1.0)):
        to.add_(x.view(kv, -1, d)[:, : to.shape[1]], alpha=factor)
    if padded_w is not None:
        dw.add_(padded_w.flatten()[: dw.shape[0]])


def _check(grad, grad_lse, out, lse) -> None:
    if grad.shape != out.shape or (grad_lse is not None and grad_lse.shape != lse.shape):
        raise ValueError(
            f"Gradients {[*grad.shape]} and {None if grad_lse is None else [*grad_lse.shape]} do not fit the outputs "
            f"{[*out.shape]} and {[*lse.shape]} of block_sparse."
        )


def _fake(grad, grad_lse, q, k, v, out, lse, idx, cnt, mode=None, qc=None, kc=None, key_log_weight=None, *_, **__):
    weight = lse.new_empty(q.shape[0], 0 if key_log_weight is None else k.shape[2])
    return like(q), like(k), like(v), weight


block_sparse_backward = torch.library.custom_op("tessera::block_sparse_backward", reference, mutates_args=())
block_sparse_backward.register_fake(_fake)


@on_gpu(block_sparse_backward)
def launch(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
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
) -> Gradients:
    """As reference, which serves what the launcher of block_sparse leaves to its own."""
    lists = (mode, query_coords, key_coords, key_log_weight, rule, radius, temporal_radius, scale, block_m, block_n)
    (batch, heads, nq, d), (kv, nk) = q.shape, k.shape[1:3]
    if q.dtype == torch.float64 or d > 256 or block_m % 16 or block_n % 16:
        return reference(grad, grad_lse, q, k, v, out, lse, idx, cnt, *lists)
    _check(grad, grad_lse, out, lse)
    dq, dk, dv = like(q), like(k), like(v)
    grad = grad.to(q.dtype)
    q, k, v, out, grad = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v, out, grad))
    lse = lse.contiguous()
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.float().contiguous()
    delta = torch.empty_like(lse)
    idx, cnt = idx.int().contiguous(), cnt.int().contiguous()
    entry_mode = idx if mode is None else mode.contiguous()
    coords = [idx if x is None else x.int().contiguous() for x in (query_coords, key_coords)]
    weighted = key_log_weight is not None
    weight = idx if key_log_weight is None else key_log_weight.float().contiguous().expand(batch, nk)
    head_dw = lse.new_empty(batch, kv, nk if weighted else 0)
    scale = d**-0.5 if scale is None else scale
    d0, d1 = split_wide(d, 8 * q.element_size())
    flags = {"D": d, "D0": d0, "D1": d1, "BLOCK_M": block_m, "BLOCK_N": block_n, "GROUP": heads // kv}
    flags |= {"RULE": rule_number(rule) if mode is not None else 0, "WEIGHTED": weighted}
    row_strides = coords[0].stride(0), coords[1].stride(0)
    tile, options = _tuned("block_sparse_dq", q, d0 + d1, block_m, block_n)
    block_sparse_dq[(triton.cdiv(nq, tile["BM"]), heads, batch)](
        q, k, v, out, grad, lse, grad_lse, delta, dq, idx, cnt, entry_mode, *coords, weight, scale, nq, nk,
        idx.shape[3], radius, temporal_radius, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        *grad.stride()[:3], *dq.stride()[:3], *lse.stride()[:2], *_steps(idx), *_steps(cnt), *row_strides,
        weight.stride(0), **flags, **tile, **options,
    )  # fmt: skip
    offsets, rows, position = transpose_lists(idx, cnt, triton.cdiv(nk, block_n))
    lists_of = (rows.shape[1] if rows.shape[0] > 1 else 0, int(rows.shape[1] > 1))
    tile, options = _tuned("block_sparse_dkv", q, d0 + d1, block_m, block_n)
    block_sparse_dkv[(triton.cdiv(nk, tile["BN"]), kv, batch)](
        q, k, v, grad, lse, delta, dk, dv, head_dw, offsets, rows, position, entry_mode, *coords, weight, scale, nq, nk,
        rows.shape[2], radius, temporal_radius, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3],
        *dk.stride()[:3], *dv.stride()[:3], *lse.stride()[:2], *_steps(idx), *lists_of, *row_strides, weight.stride(0),
        *head_dw.stride()[:2], **flags, **tile, **options,
    )  # fmt: skip
    return dq, dk, dv, head_dw.sum(1)


def _tuned(operation: str, q: torch.Tensor, width: int, block_m: int, block_n: int) -> tuple[dict, dict]:
    """Tile sizes that divide the blocks, and launch options."""
    tuned = _config.lookup(operation, q, width)
    tile = {"BM": math.gcd(block_m, tuned["tile"][0]), "BN": math.gcd(block_n, tuned["tile"][1])}
    return tile, {"num_warps": tuned["warps"], "num_stages": tuned["stages"]}


def _steps(x: torch.Tensor) -> tuple[int, int]:
    """Batch and head strides of a list, 0 where one list serves all."""
    return (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0)


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """The example of block_sparse with a random gradient."""
    from .block_sparse import block_sparse
    from .block_sparse import example as forward_example

    q, k, v, idx, cnt = forward_example(tokens, device, dtype)
    out, lse = block_sparse(q, k, v, idx, cnt)
    return torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, idx, cnt
