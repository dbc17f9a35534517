"""Packed weights back to a plain matrix, each element formed in fp32 and rounded once (packed.py: the codecs).

Where a layer has many rows of input it is decoded once into scratch memory and given to the vendor's matrix product,
which no fused kernel beats once a tile of weights would be decoded again for every tile of rows. Bandwidth bound: the
bytes are read once, the matrix is written once.
"""

import torch

from .. import _config
from .._triton import on_gpu, tl, triton
from ._decode import bytes_of, columns_of, constants, decoded, pointers, rows_of, steps, table_of, units
from ._specs import Spec, configured
from .packed import CODECS, GGUF_BLOCKS, Packed, decode

SIZES = ["N", "K", "STEPS", "units", "sb"]
_jit = triton.jit(do_not_specialize=["N", "STEPS", "sb"]) if hasattr(triton, "__version__") else triton.jit
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def reference(
    data: torch.Tensor,
    scale: torch.Tensor | None,
    table: torch.Tensor | None,
    codec: str,
    columns: int,
    group: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The parts of a Packed weight -> [N, columns] of dtype. Raises ValueError when they do not fit each other."""
    return decode(Packed(codec, columns, data, scale, table, group), dtype)


dequantize = torch.library.custom_op("tessera::dequantize", reference, mutates_args=())
dequantize.register_fake(
    lambda data, scale, table, codec, columns, group, dtype: data.new_empty(data.shape[0], columns, dtype=dtype)
)


@_jit
def dequantize_kernel(
    DATA, SCALE, TABLE, OUT, N, K, STEPS, units, sb, CODEC: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr,
    BR: tl.constexpr, SUB: tl.constexpr, PARTS: tl.constexpr, BN: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """BN rows, WALK steps. units: groups or blocks of a row, sb: scales of a row."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    live = n < N
    row = rows_of(DATA, n, units, CODEC, RUN)
    scale_row = SCALE + n.to(tl.int64) * sb
    table = table_of(TABLE, CODEC)
    for i in range(WALK):
        step = tl.program_id(1) * WALK + i
        here = live & (step < STEPS)
        low, high = bytes_of(row, here, step, K, CODEC, GROUP, RUN, BR, SUB)
        for p in tl.static_range(PARTS):
            w = decoded(row, scale_row, table, low, high, here, step, p, CODEC, GROUP, RUN, BR, SUB)
            c, held = columns_of(step, p, CODEC, GROUP, RUN, BR, SUB)
            at = OUT + n.to(tl.int64)[:, None] * K + c[None, :]
            tl.store(at, w.to(OUT.dtype.element_ty), mask=here[:, None] & (held & (c < K))[None, :])


@on_gpu(dequantize)
def launch(
    data: torch.Tensor,
    scale: torch.Tensor | None,
    table: torch.Tensor | None,
    codec: str,
    columns: int,
    group: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As reference, which serves other dtypes than fp32, fp16 and bf16."""
    Packed(codec, columns, data, scale, table, group)  # refuses what does not fit
    if dtype not in DTYPES:
        return reference(data, scale, table, codec, columns, group, dtype)
    out = data.new_empty(data.shape[0], columns, dtype=dtype)
    if out.numel():
        tuned, count = _config.lookup("dequantize", out, 1), steps(codec, columns, group)
        bn, walk = tuned["tile"]
        data, scale, table = pointers(data, scale, table)
        dequantize_kernel[(triton.cdiv(len(data), bn), triton.cdiv(count, walk))](
            data, scale, table, out, len(data), columns, count, units(codec, columns, group), scale.shape[1],
            **constants(codec, group), BN=bn, WALK=walk, num_warps=tuned["warps"],
            num_stages=tuned["stages"], enable_fp_fusion=False,
        )  # fmt: skip
    return out


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """Four-bit codes in groups of 64: as many rows as tokens, FLUX width."""
    data = torch.randint(0, 256, (tokens, 1536), device=device, dtype=torch.uint8)
    scale = torch.rand(tokens, 48, device=device).to(dtype) + 0.5
    return data, scale, torch.linspace(-1, 1, 16, device=device), "table4", 3072, 64, dtype


def aot_specs() -> list[dict]:
    """Every codec; groups of 64, 32, a whole row, and one that is no power of two."""
    args = {"DATA": "*u8", "OUT": "*bf16", "TABLE": "*fp32", "SCALE": "*bf16"} | dict.fromkeys(SIZES, "i32")
    cases = [(codec, 64) for codec in CODECS] + [("table4", 32), ("table4", 40), ("int8", 3072), ("table3", 32)]
    found = []
    for codec, group in cases:
        gguf = codec in GGUF_BLOCKS
        spec: Spec = {"kernel": "dequantize_kernel", "args": args | ({"SCALE": "*u8", "TABLE": "*u8"} if gguf else {})}
        spec["tag"] = codec if gguf else f"{codec} group {group}"
        spec["unaligned"] = ("N", "STEPS", "sb", *(("units",) if codec != "int8" else ()))
        spec["extra"] = (codec, group) != ("table4", 64)

        def const(tile, codec=codec, group=group):
            return constants(codec, group) | {"BN": tile[0], "WALK": tile[1]}

        found.append(configured(spec, "dequantize", 16, 1, const))
    return found
