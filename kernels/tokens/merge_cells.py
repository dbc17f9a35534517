"""Cells of tokens become one token each, their mean: y = [x[fine], mean(x[cell]) for each cell] (the coarse grain of a
dynamic-grain transformer, D2iT, arXiv 2504.09454, on the tokens of any model). unmerge_cells.py is the way back.
Bandwidth bound: x is read once, the short sequence written once.
"""

import torch

from .._triton import on_gpu, tl, triton
from ._rows import block, check_index, expanded

SIZES = ["M", "C", "FINE", "xb", "ib", "yb"]
_jit = triton.jit(do_not_specialize=SIZES) if hasattr(triton, "__version__") else triton.jit


def check(x: torch.Tensor, order: torch.Tensor, fine: int, size: int) -> int:
    """The number of merged tokens. ValueError where the order does not fit."""
    check_index(x, order)
    cells, rest = divmod(order.shape[-1] - fine, max(size, 1))
    if fine < 0 or size < 1 or cells < 0 or rest:
        raise ValueError(f"{order.shape[-1]} places are not {fine} fine tokens and cells of {size}.")
    return fine + cells


def reference(x: torch.Tensor, order: torch.Tensor, fine: int, size: int) -> torch.Tensor:
    """x [B, N, C], any strides; order int32 or int64, [P] or [B, P]: first the places of `fine` tokens that stay, then
    those of the cells, `size` each -> [B, fine + (P - fine) / size, C]. Means are taken in fp32 or better."""
    check(x, order, fine, size)
    at = expanded(order, x.shape[0])
    rows = x[torch.arange(x.shape[0], device=x.device)[:, None], at]
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    means = rows[:, fine:].unflatten(1, (-1, size)).to(exact).mean(2).to(x.dtype)
    return torch.cat((rows[:, :fine], means), 1)


merge_cells = torch.library.custom_op("tessera::merge_cells", reference, mutates_args=())


@merge_cells.register_fake
def _fake(x, order, fine, size):
    return x.new_empty(x.shape[0], fine + (order.shape[-1] - fine) // size, x.shape[2])


@_jit
def merge_kernel(X, ORDER, Y, M, C, FINE, xb, xn, xc, ib, yb, SIZE: tl.constexpr, BC: tl.constexpr):
    """Y[m] = X[ORDER[m]] for fine tokens, else the mean of a cell's rows; one program a row and BC channels."""
    m, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    live = c < C
    count = tl.where(m < FINE, 1, SIZE)
    first = tl.where(m < FINE, m, FINE + (m - FINE) * SIZE)
    total = tl.zeros([BC], tl.float32)
    for i in tl.static_range(SIZE):
        n = tl.load(ORDER + batch * ib + first + i, mask=i < count, other=0).to(tl.int64)
        total += tl.load(X + batch * xb + n * xn + c * xc, mask=live & (i < count), other=0.0).to(tl.float32)
    tl.store(Y + batch * yb + m * C + c, (total / count).to(Y.dtype.element_ty), mask=live)


@on_gpu(merge_cells)
def launch(x: torch.Tensor, order: torch.Tensor, fine: int, size: int) -> torch.Tensor:
    """As reference, which serves fp64."""
    if x.dtype == torch.float64:
        return reference(x, order, fine, size)
    m, order = check(x, order, fine, size), order.contiguous()
    b, _, c = x.shape
    y = x.new_empty(b, m, c)
    if y.numel():
        step = order.shape[-1] if order.ndim == 2 else 0
        merge_kernel[(m, triton.cdiv(c, block(c)), b)](
            x, order, y, m, c, fine, *x.stride(), step, m * c, SIZE=size, BC=block(c), num_warps=4
        )  # fmt: skip
    return y


def _save(ctx, inputs, output):
    x, order, ctx.fine, ctx.size = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(order)


def _gradients(ctx, grad):
    (order,) = ctx.saved_tensors
    shares = torch.cat((grad[:, : ctx.fine], (grad[:, ctx.fine :] / ctx.size).repeat_interleave(ctx.size, 1)), 1)
    at = expanded(order, ctx.shape[0])[..., None].expand_as(shares)
    return grad.new_zeros(ctx.shape).scatter_add(1, at, shares), None, None, None


merge_cells.register_autograd(_gradients, setup_context=_save)


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """Half of the cells of 4 merged, at FLUX width."""
    x = torch.randn(1, tokens, 3072, device=device).to(dtype)
    fine = tokens - tokens // 8 * 4
    return x, torch.randperm(tokens, device=device).int(), fine, 4


def aot_specs() -> list[dict]:
    found = []
    for dtype, size in (("bf16", 4), ("fp32", 4), ("bf16", 8), ("bf16", 16)):
        args = {"X": f"*{dtype}", "ORDER": "*i32", "Y": f"*{dtype}", "M": "i32", "C": "i32", "FINE": "i32"}
        args |= dict.fromkeys(("xb", "xn", "xc", "ib", "yb"), "i64")
        spec = {"kernel": "merge_kernel", "args": args, "const": {"SIZE": size, "BC": 1024}, "tag": f"{dtype} {size}"}
        found.append(
            spec | {"warps": 4, "stages": 3, "unaligned": (*SIZES, "xc"), "extra": (dtype, size) != ("bf16", 4)}
        )
    return found
