"""Log-linear sparse attention: few fine blocks exactly, everything else as means (LLSA, arXiv 2512.16615, section 3).

N tokens are pooled level after level in blocks of B to N_1, N_2 .. N_L nodes, N_l = ceil(N_(l-1) / B). Node i of level
l >= 1 has a list T_l(i) of nodes of its level (topk.hierarchical). Token i, whose ancestor on level l is i // B^l, sees

    level 0          the tokens of the level 1 nodes in T_1(i // B)
    level l < L      the children, on level l, of the level l + 1 nodes in T_(l+1)(i // B^(l+1))
    level L          all N_L nodes

in one softmax. A mean over n tokens enters with the log-weight ln n (reweight), n = B^l and in a ragged tail what is
really there: s = scale q . k + ln n, as if n equal tokens stood there. Keys are not multiplied by n, as some texts of
the paper's formula read. Without `enrich` level 0 is all there is. What a query sees finely it also sees inside the
means above, as in the paper; exclude_selected leaves chosen nodes out of every coarser level, which makes the levels a
partition of the tokens: with all nodes chosen it is dense attention. (The latter is ours.)

A program serves a tile of queries, several nodes of level 1 wide: they share the coarse keys, and the fine keys of all
of them pass by, masked to the node that chose them. So a tile has 64 rows, which Hopper's wgmma needs, whatever B is.
Cost N (W B L + N_L): N log N.

    dv_j = sum_i p_ij do_i    ds_ij = p_ij (do_i . v_j - delta_i)    dq_i = scale sum_j ds_ij k_j
    delta_i = do_i . o_i - dlse_i                                    dk_j = scale sum_i ds_ij q_i

with p normalised over all levels. Gradients of keys go key by key over those who chose them, no atomics.
"""

import logging

import torch

from .._triton import on_gpu
from . import _hierarchical_reference as plain
from ._hierarchical_launch import MOST, backward_on_gpu, forward_on_gpu
from ._hierarchical_lists import Pyramid
from .gather import check_list, outputs
from .pool import pool
from .topk import hierarchical

LEVELS = 3


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kc: torch.Tensor,
    vc: torch.Tensor,
    idx: torch.Tensor,
    cnt: torch.Tensor,
    block: int = 16,
    levels: int = 1,
    scale: float | None = None,
    enrich: bool = True,
    reweight: bool = True,
    exclude_selected: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, N, D]; k, v [B, Hkv, N, D], H a multiple of Hkv; kc, vc [B, Hkv, M, D], M = N_1 + .. + N_levels, the
    means of all levels, finest first; any strides, one float dtype. idx int32 [B, H, M, W], ascending, each node once;
    cnt int32 [B, H, M]. block: a multiple of 16. -> out like q (token-major memory if q's is), lse fp32 [B, H, N] (fp64
    for fp64), natural logarithm; 0 and -inf where a query sees nothing. Raises ValueError when sizes do not fit, a list
    does not ascend or names no node of its level."""
    pyramid = _check(q, k, v, kc, vc, idx, cnt, block, levels)
    for level in range(1, levels + 1):
        at = pyramid.at(level)
        check_list(idx[:, :, at], cnt[:, :, at], pyramid.sizes[level])
    out, lse = outputs(q)
    options = plain.Options(_scale(q, scale), enrich, reweight, exclude_selected)
    plain.forward(q, k, v, kc, vc, idx, cnt, pyramid, options, out, lse)
    return out, lse


def reference_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kc: torch.Tensor,
    vc: torch.Tensor,
    idx: torch.Tensor,
    cnt: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    block: int,
    levels: int,
    scale: float | None,
    enrich: bool,
    reweight: bool,
    exclude_selected: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, kc, vc, contiguous, from those of out and lse and what forward took and gave."""
    pyramid = _check(q, k, v, kc, vc, idx, cnt, block, levels)
    options = plain.Options(_scale(q, scale), enrich, reweight, exclude_selected)
    dq, dk, dv, dkc, dvc = plain.backward(grad_out, grad_lse, q, k, v, kc, vc, idx, cnt, out, lse, pyramid, options)
    return dq, dk, dv, dkc, dvc


def _scale(q: torch.Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _check(q, k, v, kc, vc, idx, cnt, block: int, levels: int) -> Pyramid:
    if block < 16 or block % 16 or not 1 <= levels <= LEVELS:
        raise ValueError(f"Blocks must be a multiple of 16 and levels 1 to {LEVELS}, got {block} and {levels}.")
    b, h, n, d = q.shape
    pyramid = Pyramid(n, block, levels)
    kv, m = k.shape[1], pyramid.rows
    if k.shape != (b, kv, n, d) or v.shape != k.shape or h % kv:
        raise ValueError(f"Queries {[*q.shape]} do not fit keys {[*k.shape]}, values {[*v.shape]}: [B, H, N, D] each.")
    if kc.shape != (b, kv, m, d) or vc.shape != kc.shape:
        raise ValueError(
            f"Pooled keys {[*kc.shape]} and values {[*vc.shape]} must be {[b, kv, m, d]}: all {levels} levels of {n} "
            f"tokens in blocks of {block}."
        )
    if not q.dtype == k.dtype == v.dtype == kc.dtype == vc.dtype or not q.is_floating_point():
        raise ValueError("Queries, keys, values and pooled ones need one float dtype.")
    if idx.shape[:3] != (b, h, m) or idx.ndim != 4 or cnt.shape != (b, h, m) or idx.shape[3] < 1:
        raise ValueError(f"Lists {[*idx.shape]} and counts {[*cnt.shape]} must have {[b, h, m]} rows.")
    return pyramid


hierarchical_sparse = torch.library.custom_op("tessera::hierarchical_sparse", reference, mutates_args=())
hierarchical_sparse.register_fake(lambda q, *_, **__: outputs(q))
hierarchical_sparse_backward = torch.library.custom_op(
    "tessera::hierarchical_sparse_backward", reference_backward, mutates_args=()
)


@hierarchical_sparse_backward.register_fake
def _(grad_out, grad_lse, q, k, v, kc, vc, *_):
    q, k, v, kc, vc = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, kc, vc))
    return q, k, v, kc, vc


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.options = inputs[7:]


def _backward(ctx, grad_out, grad_lse):
    grads = hierarchical_sparse_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.options)
    return (*grads, *[None] * (2 + len(ctx.options)))


hierarchical_sparse.register_autograd(_backward, setup_context=_setup_context)


def _kernel_takes(q: torch.Tensor) -> bool:
    if q.dtype == torch.float64 or q.shape[-1] > MOST:
        logging.getLogger("tessera").debug("hierarchical_sparse: reference serves %s %s", q.dtype, [*q.shape])
        return False
    return True


@on_gpu(hierarchical_sparse)
def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kc: torch.Tensor,
    vc: torch.Tensor,
    idx: torch.Tensor,
    cnt: torch.Tensor,
    block: int = 16,
    levels: int = 1,
    scale: float | None = None,
    enrich: bool = True,
    reweight: bool = True,
    exclude_selected: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference, which serves fp64 and heads above 128. The values of the lists are not read here (that would wait
    for the GPU): they must ascend, each node once."""
    pyramid = _check(q, k, v, kc, vc, idx, cnt, block, levels)
    if not _kernel_takes(q):
        return reference(q, k, v, kc, vc, idx, cnt, block, levels, scale, enrich, reweight, exclude_selected)
    out, lse = outputs(q)
    options = plain.Options(_scale(q, scale), enrich, reweight, exclude_selected)
    forward_on_gpu(q, k, v, kc, vc, idx, cnt, pyramid, options, out, lse)
    return out, lse


@on_gpu(hierarchical_sparse_backward)
def launch_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kc: torch.Tensor,
    vc: torch.Tensor,
    idx: torch.Tensor,
    cnt: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    block: int,
    levels: int,
    scale: float | None,
    enrich: bool,
    reweight: bool,
    exclude_selected: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    arguments = (q, k, v, kc, vc, idx, cnt, out, lse)
    if not _kernel_takes(q):
        options = (block, levels, scale, enrich, reweight, exclude_selected)
        return reference_backward(grad_out, grad_lse, *arguments, *options)
    pyramid = _check(q, k, v, kc, vc, idx, cnt, block, levels)
    chosen = plain.Options(_scale(q, scale), enrich, reweight, exclude_selected)
    return backward_on_gpu(grad_out, grad_lse, *arguments, pyramid, chosen)


def default_levels(tokens: int, block: int) -> int:
    """floor(log_block tokens) - 1, from 1 to 3: the coarsest level then has block to block^2 nodes."""
    levels = 1
    while levels < LEVELS and block ** (levels + 2) <= tokens:
        levels += 1
    return levels


def pooled(x: torch.Tensor, pyramid: Pyramid) -> list[torch.Tensor]:
    """[B, H, N, D] -> means of the levels 1 .. L, each pooled from the one below."""
    found = [pool(x, pyramid.block)]
    for level in range(1, pyramid.levels):
        found.append(pool(found[-1], pyramid.block, pyramid.block**level, pyramid.tokens))
    return found


def log_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    topk: int = 8,
    block: int = 16,
    levels: int | None = None,
    scale: float | None = None,
    enrich: bool = True,
    reweight: bool = True,
    exclude_selected: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Pools q [B, H, N, D], k, v [B, Hkv, N, D], selects `topk` nodes on each level, attends. levels None:
    default_levels. -> out like q, lse fp32 [B, H, N] and how many pairs (query, key) were computed over batch and heads;
    a ragged last block counts as a whole one. Gradients flow through the attention and the means of k and v, not
    through the selection. Raises ValueError when sizes do not fit."""
    b, h, n, _ = q.shape
    pyramid = Pyramid(n, block, default_levels(n, block) if levels is None else levels)
    keys, values = pooled(k, pyramid), pooled(v, pyramid)
    with torch.no_grad():
        idx, cnt = hierarchical(pooled(q, pyramid), keys, block, topk)
    means = torch.cat(keys, 2), torch.cat(values, 2)
    out, lse = hierarchical_sparse(
        q, k, v, *means, idx, cnt, block, pyramid.levels, scale, enrich, reweight, exclude_selected
    )
    return out, lse, b * h * n * keys_seen(pyramid, topk, enrich, exclude_selected)


def keys_seen(pyramid: Pyramid, topk: int, enrich: bool, exclude_selected: bool) -> int:
    """Keys of one query, all levels; every node of a level lists min(topk, N_l) of them."""
    sizes = pyramid.sizes
    seen = [min(min(topk, sizes[level + 1]) * pyramid.block, sizes[level]) for level in range(pyramid.levels)]
    seen.append(sizes[-1])
    left_out = [min(topk, size) if exclude_selected else 0 for size in sizes[1:]]
    return seen[0] + (sum(seen[1:]) - sum(left_out) if enrich else 0)


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """6 heads of 64, 8 of the blocks of 16 tokens for each."""
    q, k, v = (torch.randn(1, tokens, 6, 64, device=device).to(dtype).transpose(1, 2) for _ in range(3))
    pyramid = Pyramid(tokens, 16, default_levels(tokens, 16))
    keys, values = pooled(k, pyramid), pooled(v, pyramid)
    idx, cnt = hierarchical(pooled(q, pyramid), keys, 16, 8)
    return q, k, v, torch.cat(keys, 2), torch.cat(values, 2), idx, cnt, 16, pyramid.levels
