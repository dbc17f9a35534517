"""Pooling over blocks of consecutive tokens, the levels of a token pyramid (LLSA, arXiv 2512.16615, section 3.1; the
block means by which SLA, arXiv 2509.24006, section 4, picks its blocks).

Row j of x stands for w_j tokens, w_j = unit, for the last row what is left of `tokens`. Output row i covers the rows
i block .. (i + 1) block of x, at the end only those that exist:

    sum_i = sum_j w_j x_j            mean_i = sum_i / sum_j w_j

Pooling level after level with unit = block^l gives the mean over the tokens themselves, also in a ragged tail, which is
never filled up with zeros. Bandwidth bound: x is read once.
"""

import logging

import torch

from .._triton import on_gpu, tl, triton

TILE = 4096  # elements that a program holds at once
WIDTH = 128  # channels of a program; more channels take more programs


def _check(shape, block: int, unit: int, tokens: int | None) -> int:
    """Number of tokens that [B, H, N, D] stands for."""
    if len(shape) != 4 or shape[2] < 1:
        raise ValueError(f"pool needs [B, H, N, D] with at least one row, got {[*shape]}.")
    if block < 1 or unit < 1:
        raise ValueError(f"pool needs blocks and units of at least 1 row, got block {block}, unit {unit}.")
    tokens = shape[2] * unit if tokens is None else tokens
    if not (shape[2] - 1) * unit < tokens <= shape[2] * unit:
        raise ValueError(
            f"{shape[2]} rows of {unit} tokens stand for {(shape[2] - 1) * unit + 1} to {shape[2] * unit} tokens, "
            f"got tokens={tokens}. Pass the length of the sequence that the rows were pooled from."
        )
    return tokens


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _weights(rows: int, unit: int, tokens: int, block: int, mean: bool, like: torch.Tensor) -> torch.Tensor:
    """[ceil(rows / block), block, 1], factor of every row, 0 behind the last one."""
    blocks = -(-rows // block)
    at = torch.arange(blocks * block, device=like.device)
    held = (tokens - at * unit).clamp(0, unit).view(blocks, block, 1).to(_exact(like.dtype))
    return held / held.sum(1, keepdim=True) if mean else held


def reference(
    x: torch.Tensor,
    block: int,
    unit: int = 1,
    tokens: int | None = None,
    mean: bool = True,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [B, H, N, D], any strides -> new contiguous [B, H, ceil(N / block), D] of `dtype` (None: x's). Each row of x
    stands for `unit` of altogether `tokens` tokens (None: N unit). Accumulates in fp32, fp64 in fp64. Raises ValueError
    when N rows cannot stand for `tokens`."""
    tokens = _check(x.shape, block, unit, tokens)
    b, h, n, d = x.shape
    full, exact = n // block, _exact(x.dtype)
    weights = _weights(n, unit, tokens, block, mean, x)
    out = torch.empty(b, h, len(weights), d, dtype=dtype or x.dtype, device=x.device)
    if full:
        even = full if tokens == n * unit else full - 1  # blocks whose rows all count alike
        x_full = x[:, :, : full * block].unflatten(2, (full, block))
        out[:, :, :even] = x_full[:, :, :even].sum(3, dtype=exact) * weights[:even, 0]
        out[:, :, even:full] = (x_full[:, :, even:].to(exact) * weights[even:full]).sum(3)
    if full < len(weights):
        rest = x[:, :, full * block :]
        out[:, :, full] = (rest.to(exact) * weights[full, : rest.shape[2]]).sum(2)
    return out


def reference_backward(
    grad: torch.Tensor, rows: int, block: int, unit: int, tokens: int, mean: bool, dtype: torch.dtype
) -> torch.Tensor:
    """grad [B, H, ceil(rows / block), D] of the pooled rows -> [B, H, rows, D] of `dtype`, grad of x."""
    weights = _weights(rows, unit, tokens, block, mean, grad)
    return (grad.to(_exact(grad.dtype))[:, :, :, None] * weights).flatten(2, 3)[:, :, :rows].to(dtype, copy=True)


SIZES = ["N", "BLOCK", "UNIT", "TOKENS", "H"]
_jit = triton.jit(do_not_specialize=SIZES) if hasattr(triton, "__version__") else triton.jit


@_jit
def pool_kernel(
    X, Y, xb, xh, xn, N, D, BLOCK, UNIT, TOKENS, H, MEAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """One output row of one head, COLUMNS channels of it."""
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK
    d = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, ROWS)
    at = X + head // H * xb + head % H * xh + first.to(tl.int64) * xn
    sums = tl.zeros([COLUMNS], tl.float32)
    for row in tl.range(0, tl.minimum(BLOCK, N - first), ROWS):
        live = (row + r < BLOCK) & (first + row + r < N)
        x = tl.load(at + (row + r)[:, None] * xn + d[None, :], live[:, None] & (d < D)[None, :], 0.0).to(tl.float32)
        held = tl.minimum(TOKENS - (first + row + r) * UNIT, UNIT)
        sums += tl.sum(x * held.to(tl.float32)[:, None], 0)
    if MEAN:
        sums /= tl.minimum(TOKENS - first * UNIT, BLOCK * UNIT).to(tl.float32)
    to = Y + (head * tl.num_programs(0) + tl.program_id(0)) * D
    tl.store(to + d, sums.to(Y.dtype.element_ty), d < D)


@_jit
def pool_backward_kernel(
    G, X, xb, xh, xn, N, D, BLOCK, UNIT, TOKENS, H, MEAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """ROWS rows of x's gradient X [B, H, N, D], contiguous, from G, whose strides are given."""
    head = tl.program_id(1).to(tl.int64)
    d = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = (row < N)[:, None] & (d < D)[None, :]
    at = G + head // H * xb + head % H * xh + (row // BLOCK).to(tl.int64)[:, None] * xn
    factor = tl.minimum(TOKENS - row * UNIT, UNIT).to(tl.float32)
    if MEAN:
        factor /= tl.minimum(TOKENS - row // BLOCK * BLOCK * UNIT, BLOCK * UNIT).to(tl.float32)
    grad = tl.load(at + d[None, :], live, 0.0).to(tl.float32) * factor[:, None]
    tl.store(X + (head * N + row.to(tl.int64))[:, None] * D + d[None, :], grad.to(X.dtype.element_ty), live)


pool = torch.library.custom_op("tessera::pool", reference, mutates_args=())
pool_backward = torch.library.custom_op("tessera::pool_backward", reference_backward, mutates_args=())


@pool.register_fake
def _(x, block, unit=1, tokens=None, mean=True, dtype=None):
    return torch.empty(*x.shape[:2], -(-x.shape[2] // block), x.shape[3], dtype=dtype or x.dtype, device=x.device)


@pool_backward.register_fake
def _(grad, rows, block, unit, tokens, mean, dtype):
    return torch.empty(*grad.shape[:2], rows, grad.shape[3], dtype=dtype, device=grad.device)


def _setup_context(ctx, inputs, output):
    x, block, unit, tokens, mean, _ = inputs
    ctx.sizes = (x.shape[2], block, unit, x.shape[2] * unit if tokens is None else tokens, mean, x.dtype)


def _backward(ctx, grad):
    return pool_backward(grad, *ctx.sizes), None, None, None, None, None


pool.register_autograd(_backward, setup_context=_setup_context)


def _tile(d: int, rows: int) -> tuple[int, int]:
    columns = min(WIDTH, triton.next_power_of_2(d))
    return min(TILE // columns, triton.next_power_of_2(rows)), columns


@on_gpu(pool)
def launch(
    x: torch.Tensor,
    block: int,
    unit: int = 1,
    tokens: int | None = None,
    mean: bool = True,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """As reference, which serves fp64 and more than 2^31 tokens."""
    tokens = _check(x.shape, block, unit, tokens)
    b, h, n, d = x.shape
    result, blocks = dtype or x.dtype, -(-n // block)
    if torch.float64 in (x.dtype, result) or tokens + block * unit >= 1 << 31:
        logging.getLogger("tessera").debug("pool: reference serves %s, %d tokens", x.dtype, tokens)
        return reference(x, block, unit, tokens, mean, dtype)
    x = x if x.stride(3) == 1 else x.contiguous()
    y = torch.empty(b, h, blocks, d, dtype=result, device=x.device)
    if y.numel():
        rows, columns = _tile(d, block)
        grid = (blocks, b * h, triton.cdiv(d, columns))
        sizes = (*x.stride()[:3], n, d, block, unit, tokens, h)
        pool_kernel[grid](x, y, *sizes, MEAN=mean, ROWS=rows, COLUMNS=columns, num_warps=4)
    return y


@on_gpu(pool_backward)
def launch_backward(
    grad: torch.Tensor, rows: int, block: int, unit: int, tokens: int, mean: bool, dtype: torch.dtype
) -> torch.Tensor:
    b, h, _, d = grad.shape
    if torch.float64 in (grad.dtype, dtype) or tokens + block * unit >= 1 << 31:
        return reference_backward(grad, rows, block, unit, tokens, mean, dtype)
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    x = torch.empty(b, h, rows, d, dtype=dtype, device=grad.device)
    if x.numel():
        tile, columns = _tile(d, rows)
        grid = (triton.cdiv(rows, tile), b * h, triton.cdiv(d, columns))
        sizes = (*grad.stride()[:3], rows, d, block, unit, tokens, h)
        pool_backward_kernel[grid](grad, x, *sizes, MEAN=mean, ROWS=tile, COLUMNS=columns, num_warps=4)
    return x


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """Means over 64 tokens, 12 heads of 128, of a token-major projection."""
    return torch.randn(1, tokens, 12, 128, device=device).to(dtype).transpose(1, 2), 64


def aot_specs() -> list[dict]:
    sizes = {"xb": "i64", "xh": "i64", "xn": "i32"} | dict.fromkeys(("N", "D", "BLOCK", "UNIT", "TOKENS", "H"), "i32")
    specs = []
    for d, block in ((64, 16), (128, 64), (72, 64), (256, 4096)):
        for dtype in ("bf16", "fp32"):
            for kernel, names in (("pool_kernel", "XY"), ("pool_backward_kernel", "GX")):
                rows, columns = _tile(d, block)
                specs.append(
                    {
                        "kernel": kernel,
                        "args": dict.fromkeys(names, f"*{dtype}") | sizes,
                        "const": {"MEAN": True, "ROWS": rows, "COLUMNS": columns},
                        "tag": f"d{d} block {block} {dtype}",
                        "unaligned": tuple(SIZES),
                        "extra": dtype != "bf16" or d != 128,
                    }
                )
    return specs
