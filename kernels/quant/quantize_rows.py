"""Activations to 8 or 4 bits, one scale a row (a token), with what comes before it in one pass.

x is multiplied by 1 / smooth (SmoothQuant, arXiv 2211.10438), its columns permuted, turned by signs and a Hadamard
matrix in blocks (rotate.py), each where given; then scale = max |x| / q and code = x / scale, rounded to even: q = 127
(int8), 7 (int4, one code a byte) or 448 (fp8_e4m3). Bandwidth bound: the kernel reads a row twice, the second time from
the cache, and rounds to fp8 with integers, so it needs no GPU that has the type.
"""

import torch

from .._triton import on_gpu, tl, triton
from ._hadamard import CHUNK, WIDEST, butterfly, check, check_signs, tile, turned

MOST = {"int8": 127.0, "int4": 7.0, "fp8_e4m3": 448.0}
LEAST = 1e-30  # of the greatest value: a row of zeros has a scale, and its inverse is finite
SIZES = ["K", "xm"]


def _check(x, format, multiplier, permutation, signs, block, kind) -> torch.dtype:
    """The dtype of the codes."""
    if format not in MOST:
        raise ValueError(f"Unknown format {format!r} of activations; choose {', '.join(MOST)}.")
    k = x.shape[-1]
    if not x.is_floating_point() or not k:
        raise ValueError(f"Activations must be floating point [..., K], K > 0, got {[*x.shape]} {x.dtype}.")
    check(k, block, kind)
    check_signs(signs, k)
    for name, given in (("multiplier", multiplier), ("permutation", permutation)):
        if given is not None and tuple(given.shape) != (k,):
            raise ValueError(f"There are {k} columns, and the {name} is {[*given.shape]}.")
    if permutation is not None and permutation.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"The permutation must be int32 or int64, got {permutation.dtype}.")
    return torch.float8_e4m3fn if format == "fp8_e4m3" else torch.int8


def reference(
    x: torch.Tensor,
    format: str,
    multiplier: torch.Tensor | None = None,
    permutation: torch.Tensor | None = None,
    signs: torch.Tensor | None = None,
    block: int = 1,
    kind: str = "regular",
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K], any strides, M rows in all; multiplier (1 / smooth) and signs [K]; permutation integers [K]: column k
    is taken from permutation[k]; block 1: no rotation -> codes [M, K] int8 or float8_e4m3fn, scale fp32 [M].

    Computes in fp32. A row with NaN or infinity has a scale that is not finite, and codes 0. Raises ValueError when
    sizes do not fit."""
    dtype = _check(x, format, multiplier, permutation, signs, block, kind)
    rows, k = x.reshape(-1, x.shape[-1]), x.shape[-1]
    codes = torch.empty(rows.shape, dtype=dtype, device=x.device)
    scales = torch.empty(len(rows), dtype=torch.float32, device=x.device)
    step = max(1, CHUNK // k) if x.device.type == "cpu" else max(1, len(rows))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        y = rows[part].float()
        y = y if multiplier is None else y * multiplier.float()
        y = y if permutation is None else y.index_select(1, permutation)
        y = turned(y if signs is None else y * signs.float(), block, kind)
        scale = y.abs().amax(1).clamp_min(LEAST) / MOST[format]
        y = (y * (1.0 / scale)[:, None]).nan_to_num(0.0)
        y = y if dtype != torch.int8 else y.round()
        codes[part], scales[part] = y.clamp(-MOST[format], MOST[format]).to(dtype), scale
    return codes, scales


quantize_rows = torch.library.custom_op("tessera::quantize_rows", reference, mutates_args=())


@quantize_rows.register_fake
def _fake(x, format, multiplier=None, permutation=None, signs=None, block=1, kind="regular"):
    dtype = torch.float8_e4m3fn if format == "fp8_e4m3" else torch.int8
    rows = x[..., 0].numel()
    return x.new_empty(rows, x.shape[-1], dtype=dtype), x.new_empty(rows, dtype=torch.float32)


@triton.jit
def _columns(
    ROW, MULTIPLIER, PERMUTATION, SIGNS, c, live, SCALED: tl.constexpr, PERMUTED: tl.constexpr, SIGNED: tl.constexpr,
    LOG: tl.constexpr, REGULAR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Columns c of a row as they are quantized, fp32 [BC]."""
    if PERMUTED:
        at = tl.load(PERMUTATION + c, mask=live, other=0)
    else:
        at = c
    x = tl.load(ROW + at, mask=live, other=0.0).to(tl.float32)
    if SCALED:
        x = x * tl.load(MULTIPLIER + at, mask=live, other=0.0).to(tl.float32)
    if SIGNED:
        x = x * tl.load(SIGNS + c, mask=live, other=0.0).to(tl.float32)
    return butterfly(x, BC, LOG, REGULAR)


@triton.jit
def _rounded(x):
    """To whole numbers, halves to even; |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _fp8(x):
    """fp32 in [-448, 448] -> bytes of float8_e4m3fn."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)  # three bits of the fraction, exponent bias 7
    small = _rounded(tl.abs(x) * 512.0).to(tl.int32)  # below 2^-6 in steps of 2^-9
    code = tl.where(size < (121 << 23), small, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def quantize_kernel(
    X, MULTIPLIER, PERMUTATION, SIGNS, CODES, SCALE, K, xm, LIMIT: tl.constexpr, LEAST: tl.constexpr,
    FP8: tl.constexpr, SCALED: tl.constexpr, PERMUTED: tl.constexpr, SIGNED: tl.constexpr, LOG: tl.constexpr,
    REGULAR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, BC)
    most = tl.zeros([BC], tl.float32)
    lost = tl.zeros([BC], tl.int32)
    for start in tl.range(0, K, BC):
        c = start + b
        x = _columns(X + row * xm, MULTIPLIER, PERMUTATION, SIGNS, c, c < K, SCALED, PERMUTED, SIGNED, LOG, REGULAR, BC)
        most = tl.maximum(most, tl.abs(x))
        lost = lost | (x != x).to(tl.int32)
    scale = tl.div_rn(tl.maximum(tl.max(most, axis=0), LEAST), LIMIT)
    scale = tl.where(tl.max(lost, axis=0) > 0, float("nan"), scale)
    tl.store(SCALE + row, scale)
    inverse = tl.div_rn(1.0, scale)
    for start in tl.range(0, K, BC):
        c = start + b
        x = _columns(X + row * xm, MULTIPLIER, PERMUTATION, SIGNS, c, c < K, SCALED, PERMUTED, SIGNED, LOG, REGULAR, BC)
        x = x * inverse
        x = tl.where(x == x, tl.minimum(tl.maximum(x, -LIMIT), LIMIT), 0.0)
        if FP8:
            code = _fp8(x)
        else:
            code = _rounded(x).to(tl.int8)
        tl.store(CODES + row * K + c, code, mask=c < K)


@on_gpu(quantize_rows)
def launch(
    x: torch.Tensor,
    format: str,
    multiplier: torch.Tensor | None = None,
    permutation: torch.Tensor | None = None,
    signs: torch.Tensor | None = None,
    block: int = 1,
    kind: str = "regular",
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference, which serves blocks of more than 4096."""
    dtype = _check(x, format, multiplier, permutation, signs, block, kind)
    if block > WIDEST:
        return reference(x, format, multiplier, permutation, signs, block, kind)
    rows, k = x.reshape(-1, x.shape[-1]), x.shape[-1]
    rows = rows.float() if x.dtype == torch.float64 else rows
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    codes = torch.empty(rows.shape, dtype=dtype, device=x.device)
    scale = torch.empty(len(rows), dtype=torch.float32, device=x.device)
    fp8, limit = format == "fp8_e4m3", MOST[format]
    if len(rows):
        given = [rows if t is None else t.contiguous() for t in (multiplier, permutation, signs)]
        quantize_kernel[(len(rows),)](
            rows, *given, codes.view(torch.uint8) if fp8 else codes, scale, k, rows.stride(0), LIMIT=limit, LEAST=LEAST,
            FP8=fp8, SCALED=multiplier is not None, PERMUTED=permutation is not None, SIGNED=signs is not None,
            LOG=block.bit_length() - 1, REGULAR=kind == "regular", BC=tile(block), num_warps=tile(block) // 256,
            enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scale


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """FLUX width to int8 after a regular rotation of 256."""
    return torch.randn(1, tokens, 3072, device=device).to(dtype), "int8", None, None, None, 256


def aot_specs() -> list[dict]:
    """Rotated int8; everything at once; plain fp8."""
    found = []
    for words, fp8, log, flags in [("int8", 0, 8, 0), ("all", 1, 12, 1), ("fp8", 1, 0, 0), ("int4", 0, 7, 1)]:
        args = {"X": "*bf16", "MULTIPLIER": "*fp32", "PERMUTATION": "*i32", "SIGNS": "*fp32", "SCALE": "*fp32"}
        args |= {"CODES": "*u8" if fp8 else "*i8"} | dict.fromkeys(SIZES, "i32")
        const = {"LIMIT": 127.0, "LEAST": LEAST, "FP8": bool(fp8), "LOG": log, "REGULAR": log % 2 == 0}
        const |= dict.fromkeys(("SCALED", "PERMUTED", "SIGNED"), bool(flags)) | {"BC": tile(1 << log)}
        spec = {"kernel": "quantize_kernel", "args": args, "const": const, "warps": tile(1 << log) // 256}
        found.append(spec | {"tag": f"{words} block {1 << log}", "extra": words != "int8"})
    return found
