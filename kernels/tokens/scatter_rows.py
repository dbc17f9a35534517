"""A copy of tokens with some rows replaced, those optionally turned by RoPE: y[b, idx[b, m]] = R[idx[b, m]] rows[b, m],
and y = x elsewhere. The other half of gather_rows.py: computed tokens go back among the cached ones (RAS, arXiv
2502.10389, section 3.3). Every row of the result is written once, by its own program, so no two programs meet.
"""

import torch

from .._triton import on_gpu, triton
from ._rows import block, check_freqs, check_index, expanded, scatter_kernel, specs, table, turned
from .gather_rows import gather_rows


def _check(x, rows, idx, freqs) -> None:
    check_index(x, idx)
    check_freqs(x, freqs)
    if rows.shape != (x.shape[0], idx.shape[-1], x.shape[2]) or rows.dtype != x.dtype:
        raise ValueError(
            f"{[*rows.shape]} {rows.dtype} rows do not fit {idx.shape[-1]} places in {[*x.shape]} {x.dtype}."
        )


def reference(
    x: torch.Tensor,
    rows: torch.Tensor,
    idx: torch.Tensor,
    freqs: torch.Tensor | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """x [B, N, C]; rows [B, M, C]; idx int32 or int64, [M] or [B, M], each place once; freqs [N, P, 2, 2] or
    [B, N, P, 2, 2], those of the places; transposed: turn the other way -> [B, N, C], a new tensor.

    Raises ValueError when sizes do not fit, and for an index on the CPU that names no row.
    """
    _check(x, rows, idx, freqs)
    at = expanded(idx, x.shape[0])
    lines = torch.arange(x.shape[0], device=x.device)[:, None]
    if freqs is not None:
        freqs = freqs.transpose(-1, -2) if transposed else freqs
        freqs = freqs.expand(x.shape[0], *freqs.shape[-4:]) if freqs.ndim == 5 else freqs
        rows = turned(rows, freqs[at] if freqs.ndim == 4 else freqs[lines, at])
    y = x.clone(memory_format=torch.contiguous_format)
    y[lines, at] = rows
    return y


scatter_rows = torch.library.custom_op("tessera::scatter_rows", reference, mutates_args=())


@scatter_rows.register_fake
def _fake(x, rows, idx, freqs=None, transposed=False):
    return x.new_empty(x.shape)


@on_gpu(scatter_rows)
def launch(
    x: torch.Tensor,
    rows: torch.Tensor,
    idx: torch.Tensor,
    freqs: torch.Tensor | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """As reference, which serves fp64."""
    if x.dtype == torch.float64:
        return reference(x, rows, idx, freqs, transposed)
    _check(x, rows, idx, freqs)
    (b, n, c), m = x.shape, idx.shape[-1]
    f, pairs, step = table(x, freqs)
    source = torch.full((b, n), -1, dtype=torch.int32, device=x.device)
    source.scatter_(1, expanded(idx, b), torch.arange(m, dtype=torch.int32, device=x.device).expand(b, m))
    y = x.new_empty(b, n, c)
    if y.numel():
        scatter_kernel[(n, triton.cdiv(c, block(c)), b)](
            x, rows, source, f, y, n, m, c, pairs, *x.stride(), *rows.stride(), step, n * c,
            TURN=freqs is not None, BACK=transposed, BC=block(c), num_warps=4,
        )  # fmt: skip
    return y


def _save(ctx, inputs, output):
    _, _, idx, freqs, ctx.transposed = inputs
    ctx.save_for_backward(idx, freqs)


def _gradients(ctx, grad):
    idx, freqs = ctx.saved_tensors
    nothing = grad.new_zeros(1).expand(grad.shape[0], idx.shape[-1], grad.shape[2])
    return scatter_rows(grad, nothing, idx), gather_rows(grad, idx, freqs, not ctx.transposed), None, None, None


scatter_rows.register_autograd(_gradients, setup_context=_save)


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """Half of the tokens of FLUX width."""
    x = torch.randn(1, tokens, 3072, device=device).to(dtype)
    idx = torch.randperm(tokens, device=device)[: max(1, tokens // 2)].sort().values.int()
    return x, torch.randn(1, len(idx), 3072, device=device).to(dtype), idx


def aot_specs() -> list[dict]:
    return specs("scatter_kernel", ("X", "ROWS", "Y"), ("xb", "xn", "xc", "rb", "rn", "rc", "fb", "yb"))
