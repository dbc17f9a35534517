"""Rotation of activations before quantization: y = (x s) H, with signs s and a Hadamard matrix H in blocks of columns.

A product x W^T does not change when x and the rows of W are turned alike, but an outlier of x is spread over its block,
so that the rest keeps more of the range of a quantizer (QuaRot, arXiv 2404.00456; the adaptive rotation of LRQ-DiT,
arXiv 2508.03485, chooses it layer by layer). _hadamard.py: the matrices. The inverse is (x H) s, since H is symmetric.
Bandwidth bound: O(log b) additions for an element, in registers.
"""

import torch

from .._triton import on_gpu, tl, triton
from ._hadamard import CHUNK, WIDEST, butterfly, check, check_signs, tile, turned

SIZES = ["K", "xm"]


def reference(
    x: torch.Tensor, signs: torch.Tensor | None, block: int, kind: str = "regular", inverse: bool = False
) -> torch.Tensor:
    """x [..., K], any strides; signs [K]; blocks of so many columns; kind sylvester or regular -> [..., K], contiguous.

    Computes in fp32, fp64 in fp64. Raises ValueError for blocks that do not exist or do not divide K."""
    check(x.shape[-1], block, kind)
    check_signs(signs, x.shape[-1])
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    s = None if signs is None else signs.to(exact)
    step = max(1, CHUNK // max(1, x.shape[-1])) if x.device.type == "cpu" else max(1, len(rows))
    for start in range(0, len(rows), step):
        part = rows[start : start + step].to(exact)
        part = part if s is None or inverse else part * s
        part = turned(part, block, kind)
        out[start : start + step] = part if s is None or not inverse else part * s
    return out.view(x.shape)


rotate = torch.library.custom_op("tessera::rotate", reference, mutates_args=())
rotate.register_fake(lambda x, *_, **__: x.new_empty(x.shape))


@triton.jit
def rotate_kernel(
    X, SIGNS, OUT, K, xm, SIGNED: tl.constexpr, BACK: tl.constexpr, LOG: tl.constexpr, REGULAR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """BC columns of one row."""
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BC + tl.arange(0, BC)
    x = tl.load(X + row * xm + c, mask=c < K, other=0.0).to(tl.float32)
    if SIGNED:
        s = tl.load(SIGNS + c, mask=c < K, other=0.0).to(tl.float32)
    if SIGNED and not BACK:
        x = x * s
    x = butterfly(x, BC, LOG, REGULAR)
    if SIGNED and BACK:
        x = x * s
    tl.store(OUT + row * K + c, x.to(OUT.dtype.element_ty), mask=c < K)


@on_gpu(rotate)
def launch(
    x: torch.Tensor, signs: torch.Tensor | None, block: int, kind: str = "regular", inverse: bool = False
) -> torch.Tensor:
    """As reference, which serves fp64 and blocks of more than 4096."""
    k = x.shape[-1]
    check(k, block, kind)
    check_signs(signs, k)
    if x.dtype == torch.float64 or block > WIDEST:
        return reference(x, signs, block, kind, inverse)
    rows, out = x.reshape(-1, k), x.new_empty(x.shape)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    if out.numel():
        rotate_kernel[(len(rows), triton.cdiv(k, tile(block)))](
            rows, rows if signs is None else signs.contiguous(), out, k, rows.stride(0), SIGNED=signs is not None,
            BACK=inverse, LOG=block.bit_length() - 1, REGULAR=kind == "regular", BC=tile(block),
            num_warps=tile(block) // 256,
        )  # fmt: skip
    return out


def _save(ctx, inputs, output):
    _, signs, *ctx.rest, ctx.inverse = inputs
    ctx.save_for_backward(signs)


def _gradients(ctx, grad):
    return rotate(grad, *ctx.saved_tensors, *ctx.rest, not ctx.inverse), None, None, None, None


rotate.register_autograd(_gradients, setup_context=_save)


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """FLUX width, regular blocks of 256, random signs."""
    signs = torch.randint(0, 2, (3072,), device=device).to(dtype) * 2 - 1
    return torch.randn(1, tokens, 3072, device=device).to(dtype), signs, 256


def aot_specs() -> list[dict]:
    found = []
    for dtype, log, regular in [("bf16", 8, True), ("bf16", 7, False), ("fp32", 12, True), ("bf16", 12, False)]:
        args = {"X": f"*{dtype}", "SIGNS": f"*{dtype}", "OUT": f"*{dtype}"} | dict.fromkeys(SIZES, "i32")
        const = {"SIGNED": True, "BACK": False, "LOG": log, "REGULAR": regular, "BC": tile(1 << log)}
        spec = {"kernel": "rotate_kernel", "args": args, "const": const, "warps": tile(1 << log) // 256}
        found.append(spec | {"tag": f"{dtype} block {1 << log} {regular}", "extra": log != 8})
    return found
