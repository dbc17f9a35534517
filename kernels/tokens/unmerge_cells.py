"""The way back from merge_cells.py: every token takes the change of the merged one that stood for it,
y[i] = x[i] + (after[owner[i]] - before[owner[i]]); a token that stayed alone is taken as it came out. Where before holds
the means of x, the means of y over the cells are after: what a cell's token gained is kept, and so is the detail of x.
"""

import torch

from .._triton import on_gpu, tl, triton
from ._rows import block, check_index, expanded

SIZES = ["N", "C", "FINE", "xb", "bb", "ab", "ob", "yb"]
_jit = triton.jit(do_not_specialize=SIZES) if hasattr(triton, "__version__") else triton.jit


def check(x: torch.Tensor, before: torch.Tensor, after: torch.Tensor, owner: torch.Tensor) -> None:
    check_index(before, owner)
    if owner.shape[-1] != x.shape[1] or before.shape != after.shape or before.shape[::2] != x.shape[::2]:
        raise ValueError(
            f"Tokens {[*x.shape]}, merged ones {[*before.shape]} and {[*after.shape]} and owners {[*owner.shape]} do not "
            "belong together."
        )
    if len({x.dtype, before.dtype, after.dtype}) > 1:
        raise ValueError(f"Tokens and merged ones must share a dtype, got {x.dtype}, {before.dtype}, {after.dtype}.")


def reference(
    x: torch.Tensor, before: torch.Tensor, after: torch.Tensor, owner: torch.Tensor, fine: int
) -> torch.Tensor:
    """x [B, N, C]; before, after [B, M, C], any strides; owner int32 or int64 [N] or [B, N]: the merged token of each,
    those below `fine` stand for one token -> [B, N, C]. Sums are taken in fp32 or better."""
    check(x, before, after, owner)
    at = expanded(owner, x.shape[0])
    lines = torch.arange(x.shape[0], device=x.device)[:, None]
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    new = after[lines, at]
    moved = x.to(exact) + (new.to(exact) - before[lines, at].to(exact))
    return torch.where((at < fine)[..., None], new, moved.to(x.dtype))


unmerge_cells = torch.library.custom_op("tessera::unmerge_cells", reference, mutates_args=())


@unmerge_cells.register_fake
def _fake(x, before, after, owner, fine):
    return x.new_empty(x.shape)


@_jit
def unmerge_kernel(
    X, BEFORE, AFTER, OWNER, Y, N, C, FINE, xb, xn, xc, bb, bn, bc, ab, an, ac, ob, yb, BC: tl.constexpr
):  # fmt: skip
    """One program a token and BC channels."""
    n, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    live = c < C
    m = tl.load(OWNER + batch * ob + n).to(tl.int64)
    y = tl.load(AFTER + batch * ab + m * an + c * ac, mask=live, other=0.0).to(tl.float32)
    if m >= FINE:
        before = tl.load(BEFORE + batch * bb + m * bn + c * bc, mask=live, other=0.0).to(tl.float32)
        y = tl.load(X + batch * xb + n * xn + c * xc, mask=live, other=0.0).to(tl.float32) + (y - before)
    tl.store(Y + batch * yb + n * C + c, y.to(Y.dtype.element_ty), mask=live)


@on_gpu(unmerge_cells)
def launch(x: torch.Tensor, before: torch.Tensor, after: torch.Tensor, owner: torch.Tensor, fine: int) -> torch.Tensor:
    """As reference, which serves fp64."""
    if x.dtype == torch.float64:
        return reference(x, before, after, owner, fine)
    check(x, before, after, owner)
    (b, n, c), owner = x.shape, owner.contiguous()
    y = x.new_empty(b, n, c)
    if y.numel():
        unmerge_kernel[(n, triton.cdiv(c, block(c)), b)](
            x, before, after, owner, y, n, c, fine, *x.stride(), *before.stride(), *after.stride(),
            n if owner.ndim == 2 else 0, n * c, BC=block(c), num_warps=4,
        )  # fmt: skip
    return y


def _save(ctx, inputs, output):
    _, before, _, owner, ctx.fine = inputs
    ctx.shape = before.shape
    ctx.save_for_backward(owner)


def _gradients(ctx, grad):
    (owner,) = ctx.saved_tensors
    at = expanded(owner, ctx.shape[0])[..., None]
    coarse = torch.where(at >= ctx.fine, grad, torch.zeros_like(grad))
    gather = lambda g: g.new_zeros(ctx.shape).scatter_add(1, at.expand_as(g), g)  # noqa: E731
    return coarse, -gather(coarse), gather(grad), None, None


unmerge_cells.register_autograd(_gradients, setup_context=_save)


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """Half of the cells of 4 merged, at FLUX width."""
    cells = tokens // 8
    fine = tokens - 4 * cells
    owner = torch.cat((torch.arange(fine), (fine + torch.arange(cells)).repeat_interleave(4)))
    owner = owner[torch.randperm(tokens)].int().to(device)
    short = [torch.randn(1, fine + cells, 3072, device=device).to(dtype) for _ in range(2)]
    return torch.randn(1, tokens, 3072, device=device).to(dtype), *short, owner, fine


def aot_specs() -> list[dict]:
    found = []
    for dtype in ("bf16", "fp32"):
        args = dict.fromkeys(("X", "BEFORE", "AFTER"), f"*{dtype}") | {"OWNER": "*i32", "Y": f"*{dtype}"}
        args |= dict.fromkeys(("N", "C", "FINE"), "i32")
        args |= dict.fromkeys(("xb", "xn", "xc", "bb", "bn", "bc", "ab", "an", "ac", "ob", "yb"), "i64")
        spec = {"kernel": "unmerge_kernel", "args": args, "const": {"BC": 1024}, "tag": dtype, "warps": 4, "stages": 3}
        found.append(spec | {"unaligned": (*SIZES, "xc", "bc", "ac"), "extra": dtype != "bf16"})
    return found
