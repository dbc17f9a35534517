"""Linear layer of int8 codes and a packed weight of small integers (W4A8): with codes x, integers t and a scale for each
row n and group g of columns,

    y[m, n] = x_scale[m] sum_g scale[n, g] sum_{k in g} x[m, k] t[n, k] + b[n].

The inner sum is exact in int32; the outer one is fp32. The weight's codes become int8 in registers (through the table,
whose values must be whole numbers of -128 to 127) and never reach memory. For GPUs without a product of four bits.
"""

import torch

from .. import _config
from .._triton import on_gpu, tl, triton
from ._decode import bytes_of, codes_of, columns_of, constants, looked_up, pointers, rows_of, steps, table_of, units
from ._specs import Spec, configured
from .packed import TABLE_BITS, Packed, unpack_codes
from .scaled_linear import check_scales, integer_product

SIZES = ["M", "N", "K", "STEPS", "xm", "units", "sb"]
_jit = triton.jit(do_not_specialize=["M", "N", "STEPS", "sb"]) if hasattr(triton, "__version__") else triton.jit
CODECS = (*TABLE_BITS, "int8")
LEAST = 32  # columns of one product of int8
FEW, MANY = 16, 128  # rows: widths in kernels/configs
CPU_SUMS = 1 << 18  # results that the reference holds in fp32 at once


def check(x, x_scale, data, scale, table, bias, codec: str, columns: int, group: int) -> None:
    if codec not in CODECS:
        raise ValueError(f"{codec} has no integers with one scale a group; use packed_linear. {', '.join(CODECS)} do.")
    Packed(codec, columns, data, scale, table, group)
    if x.dtype != torch.int8 or x.ndim != 2 or x.shape[1] != columns:
        raise ValueError(f"The weight has {columns} columns and needs int8 codes [M, K], got {[*x.shape]} {x.dtype}.")
    check_scales(x_scale, len(x), bias, len(data))
    if table is not None and table.device.type == "cpu" and not torch.equal(table, table.round().clamp(-128, 127)):
        raise ValueError("The table must hold whole numbers of -128 to 127; use packed_linear for any other.")


def reference(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor | None,
    table: torch.Tensor | None,
    bias: torch.Tensor | None,
    codec: str,
    columns: int,
    group: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x int8 [M, K]; x_scale [M]; data, scale, table, codec (table4, table3 or int8), columns K, group: a Packed weight
    [N, K] of integers; bias [N] -> [M, N] of dtype.

    A few rows of the weight at a time. Raises ValueError when sizes do not fit; on the CPU for a table that is not of
    whole numbers."""
    check(x, x_scale, data, scale, table, bias, codec, columns, group)
    assert scale is not None  # check has seen to it
    out = torch.empty(len(x), len(data), dtype=dtype, device=x.device)
    step = max(16, CPU_SUMS // max(1, len(x))) if x.device.type == "cpu" else max(1, len(data))
    for start in range(0, len(data), step):
        rows = slice(start, start + step)
        w, y = _integers(data[rows], table, codec, group), torch.zeros(1, device=x.device)
        for g in range(scale.shape[1]):
            part = slice(g * group, min((g + 1) * group, columns))
            y = y + integer_product(x[:, part], w[:, part]).float() * scale[rows, g].float()
        y = y * x_scale.float()[:, None]
        out[:, rows] = y if bias is None else y + bias[rows].float()
    return out


def _integers(data: torch.Tensor, table: torch.Tensor | None, codec: str, group: int) -> torch.Tensor:
    """int8 [N, K], with the padding of the last group."""
    if table is None or codec == "int8":
        return data.contiguous().view(torch.int8)
    index = unpack_codes(data, codec, group).to(torch.int32)
    return table.to(torch.int8).index_select(0, index.flatten()).view(index.shape)


scaled_packed_linear = torch.library.custom_op("tessera::scaled_packed_linear", reference, mutates_args=())


@scaled_packed_linear.register_fake
def _fake(x, x_scale, data, scale, table, bias, codec, columns, group, dtype):
    return x.new_empty(len(x), len(data), dtype=dtype)


@_jit
def scaled_packed_product(
    X, XS, DATA, SCALE, TABLE, BIAS, OUT, M, N, K, STEPS, xm, units, sb, CODEC: tl.constexpr, GROUP: tl.constexpr,
    RUN: tl.constexpr, BR: tl.constexpr, SUB: tl.constexpr, PARTS: tl.constexpr, BIASED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM x BN of the result, formed as its transpose, as in _product.py."""
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    live, live_m = n < N, (rm < M)[None, :]
    row, scale_row = rows_of(DATA, n, units, CODEC, RUN), SCALE + n.to(tl.int64) * sb
    x_row = X + rm.to(tl.int64)[None, :] * xm
    table = table_of(TABLE, CODEC).to(tl.int32)
    acc = tl.zeros([BN, BM], tl.float32)
    for step in tl.range(0, STEPS):
        low, high = bytes_of(row, live, step, K, CODEC, GROUP, RUN, BR, SUB)
        total = tl.zeros([BN, BM], tl.int32)
        for p in tl.static_range(PARTS):
            c, held = columns_of(step, p, CODEC, GROUP, RUN, BR, SUB)
            x = tl.load(x_row + c[:, None], mask=live_m & (held & (c < K))[:, None], other=0)  # [BR, BM]
            w = codes_of(low, high, step, p, CODEC, RUN, BR, SUB)
            if CODEC != "int8":
                w = looked_up(table, w)
            total = tl.dot(w.to(tl.int8), x, total, out_dtype=tl.int32)
        gain = tl.load(scale_row + step // SUB, mask=live, other=0.0).to(tl.float32)
        acc += total.to(tl.float32) * gain[:, None]
    acc = acc * tl.load(XS + rm, mask=rm < M, other=0.0).to(tl.float32)[None, :]
    if BIASED:
        acc += tl.load(BIAS + n, mask=live, other=0.0).to(tl.float32)[:, None]
    at = OUT + rm.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(at, acc.to(OUT.dtype.element_ty), mask=live[:, None] & live_m)


@on_gpu(scaled_packed_linear)
def launch(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor | None,
    table: torch.Tensor | None,
    bias: torch.Tensor | None,
    codec: str,
    columns: int,
    group: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As reference, which serves fp64."""
    check(x, x_scale, data, scale, table, bias, codec, columns, group)
    if dtype == torch.float64:
        return reference(x, x_scale, data, scale, table, bias, codec, columns, group, dtype)
    m, n = len(x), len(data)
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    if out.numel():
        x = x if x.stride(1) == 1 else x.contiguous()
        tuned = _config.lookup("scaled_packed_linear", x, FEW if m <= FEW else MANY)
        bm, bn = tuned["tile"]
        data, scale, table = pointers(data, scale, table)
        scaled_packed_product[(triton.cdiv(n, bn), triton.cdiv(m, bm))](
            x, x_scale.contiguous(), data, scale, table, x_scale if bias is None else bias.contiguous(), out, m, n,
            columns, steps(codec, columns, group, LEAST), x.stride(0), units(codec, columns, group), scale.shape[1],
            **constants(codec, group, LEAST), BIASED=bias is not None, BM=bm, BN=bn, num_warps=tuned["warps"],
            num_stages=tuned["stages"],
        )  # fmt: skip
    return out


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """A square layer of FLUX width with the integers -8 to 7 in groups of 64."""
    x = torch.randint(-127, 128, (tokens, 3072), device=device, dtype=torch.int8)
    data = torch.randint(0, 256, (3072, 1536), device=device, dtype=torch.uint8)
    scale = (torch.rand(3072, 48, device=device) + 0.5).to(dtype)
    table, x_scale = torch.arange(-8.0, 8, device=device), torch.rand(tokens, device=device) / 1000
    return x, x_scale, data, scale, table, None, "table4", 3072, 64, dtype


def aot_specs() -> list[dict]:
    """Every codec; groups of 32 and 128."""
    args = {
        "X": "*i8",
        "XS": "*fp32",
        "DATA": "*u8",
        "SCALE": "*bf16",
        "TABLE": "*fp32",
        "BIAS": "*bf16",
        "OUT": "*bf16",
    }
    args |= dict.fromkeys(SIZES, "i32")
    found = []
    for codec, group in (("table4", 64), ("table4", 32), ("table4", 128), ("table3", 64), ("int8", 64), ("int8", 3072)):
        for rows in (FEW, MANY):
            spec: Spec = {"kernel": "scaled_packed_product", "args": args, "tag": f"{codec} group {group} rows {rows}"}
            spec["expect"] = {"sm90": "IGMMA", "gfx942": "mfma"} if rows == MANY else {}
            spec["unaligned"] = ("M", "N", "STEPS", "sb", *(("units",) if codec != "int8" else ()))
            spec["extra"] = (codec, group, rows) != ("table4", 64, MANY)

            def const(tile, codec=codec, group=group):
                return constants(codec, group, LEAST) | {"BIASED": True, "BM": tile[0], "BN": tile[1]}

            found.append(configured(spec, "scaled_packed_linear", 8, rows, const))
    return found
