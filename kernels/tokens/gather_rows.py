"""Rows of tokens by index, optionally turned by RoPE on the way: y[b, m] = R[idx[b, m]] x[b, idx[b, m]].

This is how a method that computes only some tokens (RAS, arXiv 2502.10389; DyDiT, arXiv 2410.03456) makes the short
sequence. R holds one 2 x 2 matrix for each pair of channels of a head, the form of ComfyUI's rope().
Bandwidth bound: the kept rows are read and written once.
"""

import torch

from .._triton import on_gpu, triton
from ._rows import block, check_freqs, check_index, expanded, gather_kernel, specs, table, turned


def reference(
    x: torch.Tensor, idx: torch.Tensor, freqs: torch.Tensor | None = None, transposed: bool = False
) -> torch.Tensor:
    """x [B, N, C], any strides; idx int32 or int64, [M] or [B, M], each row at most once where a gradient is wanted;
    freqs [N, P, 2, 2] or [B, N, P, 2, 2] with C a multiple of 2 P; transposed: turn the other way.

    -> [B, M, C]. Raises ValueError when sizes do not fit, and for an index on the CPU that names no row; a GPU kernel
    cannot know in time and gives zeros there.
    """
    check_index(x, idx)
    check_freqs(x, freqs)
    at = expanded(idx, x.shape[0])
    lines = torch.arange(x.shape[0], device=x.device)[:, None]
    y = x[lines, at]
    if freqs is None:
        return y
    freqs = freqs.transpose(-1, -2) if transposed else freqs
    freqs = freqs.expand(x.shape[0], *freqs.shape[-4:]) if freqs.ndim == 5 else freqs
    return turned(y, freqs[at] if freqs.ndim == 4 else freqs[lines, at])


gather_rows = torch.library.custom_op("tessera::gather_rows", reference, mutates_args=())


@gather_rows.register_fake
def _fake(x, idx, freqs=None, transposed=False):
    return x.new_empty(x.shape[0], idx.shape[-1], x.shape[2])


@on_gpu(gather_rows)
def launch(
    x: torch.Tensor, idx: torch.Tensor, freqs: torch.Tensor | None = None, transposed: bool = False
) -> torch.Tensor:
    """As reference, which serves fp64."""
    if x.dtype == torch.float64:
        return reference(x, idx, freqs, transposed)
    check_index(x, idx)
    check_freqs(x, freqs)
    (b, n, c), m, idx = x.shape, idx.shape[-1], idx.contiguous()
    f, pairs, step = table(x, freqs)
    y = x.new_empty(b, m, c)
    if y.numel():
        gather_kernel[(m, triton.cdiv(c, block(c)), b)](
            x, idx, f, y, n, m, c, pairs, *x.stride(), m if idx.ndim == 2 else 0, step, m * c,
            TURN=freqs is not None, BACK=transposed, BC=block(c), num_warps=4,
        )  # fmt: skip
    return y


def _save(ctx, inputs, output):
    x, idx, freqs, ctx.transposed = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(idx, freqs)


def _gradients(ctx, grad):
    from .scatter_rows import scatter_rows

    idx, freqs = ctx.saved_tensors
    zeros = grad.new_zeros(1).expand(ctx.shape)
    return scatter_rows(zeros, grad, idx, freqs, not ctx.transposed), None, None, None


gather_rows.register_autograd(_gradients, setup_context=_save)


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """Half of the tokens of FLUX width."""
    x = torch.randn(1, tokens, 3072, device=device).to(dtype)
    return x, torch.randperm(tokens, device=device)[: max(1, tokens // 2)].sort().values.int()


def aot_specs() -> list[dict]:
    return specs("gather_kernel", ("X", "Y"), ("xb", "xn", "xc", "ib", "fb", "yb"))
