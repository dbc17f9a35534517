"""Linear layer with a packed weight: y = x W^T + b, W decoded on the way (packed.py: the codecs; LRQ-DiT, arXiv
2508.03485, for weights of a 16-entry table).

Up to FEW rows the product is bound by the bytes of the weight: the steps of a row are split over many programs, whose
sums in fp32 are added in a second launch, always in the same order. Up to FUSED rows tiles of the weight are decoded in
registers for the matrix product. Beyond, decoding a tile again for each tile of rows costs more than writing the matrix
once into scratch memory for the vendor's product, unless that memory is not to be had: `mode` decides.
"""

import torch
from torch.nn import functional

from .. import _config
from .._triton import on_gpu, triton
from ._decode import constants, pointers, steps, units
from ._product import SIZES, SUM_SIZES, packed_product, packed_sum
from ._specs import Spec, configured
from .dequantize import DTYPES, dequantize
from .packed import CODECS, GGUF_BLOCKS, Packed, decode

AUTO, FUSED, SCRATCH = range(3)
FEW, SOME = 16, 64  # rows: split sums; rows up to which auto decodes in registers
PROGRAMS = 1024  # that the splits aim at: several for each multiprocessor, so that loads overlap
BLOCK = 1024
CPU_BYTES, GPU_BYTES = 8 << 20, 64 << 20  # of decoded weights that the reference holds at once


def check(x, data, scale, table, bias, codec: str, columns: int, group: int, mode: int) -> Packed:
    weight = Packed(codec, columns, data, scale, table, group)
    if not x.is_floating_point() or x.shape[-1] != columns:
        raise ValueError(f"The weight has {columns} columns, and its input is {[*x.shape]} {x.dtype}.")
    if bias is not None and tuple(bias.shape) != (data.shape[0],):
        raise ValueError(f"The weight has {data.shape[0]} rows, and its bias is {[*bias.shape]}.")
    if mode not in (AUTO, FUSED, SCRATCH):
        raise ValueError(f"mode is 0 (automatic), 1 (fused) or 2 (scratch memory), got {mode}.")
    return weight


def reference(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor | None,
    table: torch.Tensor | None,
    bias: torch.Tensor | None,
    codec: str,
    columns: int,
    group: int,
    mode: int = AUTO,
) -> torch.Tensor:
    """x [..., K]; data, scale, table, codec, columns K, group: a Packed weight [N, K]; bias [N] -> [..., N] of x's dtype.

    The weight is rounded to x's dtype, products are summed in at least fp32. Never holds more than a few MiB of it.
    Raises ValueError when sizes do not fit."""
    check(x, data, scale, table, bias, codec, columns, group, mode)
    on_cpu = x.device.type == "cpu"
    exact = torch.float32 if x.dtype == torch.float16 and on_cpu else x.dtype  # fp16 has no fast product there
    rows, out = x.reshape(-1, columns).to(exact), x.new_empty(x[..., 0].numel(), data.shape[0])
    step = max(1, (CPU_BYTES if on_cpu else GPU_BYTES) // max(1, columns * exact.itemsize))
    for start in range(0, data.shape[0], step):
        part = slice(start, start + step)
        weight = Packed(codec, columns, data[part], None if scale is None else scale[part], table, group)
        w = decode(weight, x.dtype).to(exact)
        out[:, part] = functional.linear(rows, w, None if bias is None else bias[part].to(exact))
    return out.view(*x.shape[:-1], data.shape[0])


packed_linear = torch.library.custom_op("tessera::packed_linear", reference, mutates_args=())
packed_linear.register_fake(lambda x, data, *_, **__: x.new_empty(*x.shape[:-1], data.shape[0]))


@on_gpu(packed_linear)
def launch(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor | None,
    table: torch.Tensor | None,
    bias: torch.Tensor | None,
    codec: str,
    columns: int,
    group: int,
    mode: int = AUTO,
) -> torch.Tensor:
    """As reference, which serves fp64."""
    check(x, data, scale, table, bias, codec, columns, group, mode)
    if x.dtype not in DTYPES:
        return reference(x, data, scale, table, bias, codec, columns, group, mode)
    rows = x.reshape(-1, columns)
    if mode == SCRATCH or (mode == AUTO and len(rows) > SOME):
        w = dequantize(data, scale, table, codec, columns, group, x.dtype)
        return functional.linear(x, w, None if bias is None else bias.to(x.dtype))
    out = x.new_empty(len(rows), data.shape[0])
    if out.numel():
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        _fused(rows, data, scale, table, bias, codec, columns, group, out)
    return out.view(*x.shape[:-1], data.shape[0])


def width(codec: str, rows: int) -> int:
    """Of the entry in kernels/configs. Decoding q6_k fills the registers that a large tile needs;
    so do four products of table3 in one step, which Triton 3.6 even drops without a word on sm100."""
    return FEW if rows <= FEW else SOME if rows <= SOME or codec in ("q6_k", "table3") else 2 * SOME


def _fused(x, data, scale, table, bias, codec, columns, group, out) -> None:
    (m, n), count = out.shape, steps(codec, columns, group)
    tuned = _config.lookup("packed_linear", x, width(codec, m))
    bm, bn = tuned["tile"]
    tiles = triton.cdiv(n, bn) * triton.cdiv(m, bm)
    span = triton.cdiv(count, max(1, min(count // 2, PROGRAMS // tiles)))
    splits = triton.cdiv(count, span)
    part = out if splits == 1 else out.new_empty(splits, m, n, dtype=torch.float32)
    data, scale, table = pointers(data, scale, table)
    packed_product[(triton.cdiv(n, bn), triton.cdiv(m, bm), splits)](
        x, data, scale, table, x if bias is None else bias, part, m, n, columns, count, span, x.stride(0),
        units(codec, columns, group), scale.shape[1], **constants(codec, group), BM=bm, BN=bn,
        BIASED=bias is not None and splits == 1, num_warps=tuned["warps"], num_stages=tuned["stages"],
    )  # fmt: skip
    if splits > 1:
        packed_sum[(triton.cdiv(out.numel(), BLOCK),)](
            part, x if bias is None else bias, out, out.numel(), n, splits, BIASED=bias is not None, BLOCK=BLOCK
        )


def _save(ctx, inputs, output):
    x, data, scale, table, bias, *ctx.rest, _ = inputs
    ctx.biased = bias is not None
    ctx.save_for_backward(data, scale, table)


def _gradients(ctx, grad):
    """Of x and the bias. The weight is fixed."""
    w = dequantize(*ctx.saved_tensors, *ctx.rest, grad.dtype)
    return grad @ w, None, None, None, grad.flatten(0, -2).sum(0) if ctx.biased else None, *[None] * 4


packed_linear.register_autograd(_gradients, setup_context=_save)


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """A square layer of FLUX width with four-bit codes in groups of 64."""
    x, bias = (torch.randn(*size, device=device).to(dtype) for size in ((1, tokens, 3072), (3072,)))
    data = torch.randint(0, 256, (3072, 1536), device=device, dtype=torch.uint8)
    scale = (torch.rand(3072, 48, device=device) + 0.5).to(dtype)
    return x, data, scale, torch.linspace(-1, 1, 16, device=device), bias, "table4", 3072, 64


def aot_specs() -> list[dict]:
    """Every codec for few, some and many rows; groups of 32, 128 and a whole row."""
    cases = [(codec, 64) for codec in CODECS] + [("table4", 32), ("table4", 128), ("table3", 128), ("int8", 3072)]
    args = {"X": "*bf16", "DATA": "*u8", "TABLE": "*fp32", "SCALE": "*bf16", "BIAS": "*bf16"}
    args |= dict.fromkeys(SIZES, "i32")
    found = []
    for codec, group in cases:
        for bits, rows in ((16, FEW), (16, SOME), (16, 2 * SOME), (32, FEW), (32, 2 * SOME)):
            if bits == 32 and group != 64:
                continue
            gguf, split = codec in GGUF_BLOCKS, rows == FEW
            own = args | {"OUT": "*fp32" if split else "*bf16"} | ({"SCALE": "*u8", "TABLE": "*u8"} if gguf else {})
            own |= {"X": "*fp32", "OUT": "*fp32"} if bits == 32 else {}
            spec: Spec = {
                "kernel": "packed_product",
                "args": own,
                "tag": f"{codec} group {group} rows {rows} {bits} bits",
            }
            spec["unaligned"] = ("M", "N", "STEPS", "SPAN", "sb", *(("units",) if codec != "int8" else ()))
            spec["expect"] = {"sm90": "HGMMA", "gfx942": "mfma"} if bits == 16 and rows > FEW else {}
            spec["extra"] = (codec, group, bits, rows) != ("table4", 64, 16, 2 * SOME)

            def const(tile, codec=codec, group=group, split=split):
                return constants(codec, group) | {"BIASED": not split, "BM": tile[0], "BN": tile[1]}

            found.append(configured(spec, "packed_linear", bits, width(codec, rows), const))
    args = {"PART": "*fp32", "BIAS": "*bf16", "OUT": "*bf16"} | dict.fromkeys(SUM_SIZES, "i32")
    added = {"BIASED": True, "BLOCK": BLOCK}
    found.append({"kernel": "packed_sum", "args": args, "const": added, "unaligned": tuple(SUM_SIZES)})
    return found
