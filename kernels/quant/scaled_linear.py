"""Linear layer on codes of eight bits (W8A8): y[m, n] = x_scale[m] w_scale[n] sum_k x[m, k] w[n, k] + b[n].

int8 sums are exact in int32; float8_e4m3 sums are fp32 (on Hopper added to fp32 after each tile of columns, since its
matrix unit alone keeps fewer bits). One scale a row on either side is all that can be taken out of the sum. Matrix
products of eight bits run at up to twice the speed of bf16, with half of its bytes.
"""

import logging

import torch
from torch.nn import functional

from .. import _config
from .._triton import on_gpu, tl, triton
from ._specs import Spec, configured

SIZES = ["M", "N", "K", "xm", "wn"]
_jit = triton.jit(do_not_specialize=["M", "N"]) if hasattr(triton, "__version__") else triton.jit
EXACT = 1024  # columns whose products of int8 a sum in fp32 holds exactly
FEW, MANY = 16, 128  # rows: widths in kernels/configs
BAND = 8  # tiles of rows that share tiles of the weight in the L2 cache


def check(x, x_scale, weight, weight_scale, bias) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"Codes [M, K] and a weight [N, K] are needed, got {[*x.shape]} and {[*weight.shape]}.")
    if x.dtype != weight.dtype or x.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"Both must be int8 or float8_e4m3fn, got {x.dtype} and {weight.dtype}.")
    check_scales(x_scale, len(x), bias, len(weight))
    if tuple(weight_scale.shape) != (len(weight),):
        raise ValueError(f"The weight has {len(weight)} rows, and its scales are {[*weight_scale.shape]}.")


def check_scales(x_scale, rows: int, bias, columns: int) -> None:
    if tuple(x_scale.shape) != (rows,):
        raise ValueError(f"There are {rows} rows of codes, and their scales are {[*x_scale.shape]}.")
    if bias is not None and tuple(bias.shape) != (columns,):
        raise ValueError(f"The weight has {columns} rows, and its bias is {[*bias.shape]}.")


def integer_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """int8 x [M, K], w [N, K] -> x w^T, exact, int32 [M, N]."""
    return torch._int_mm(x, w.t()) if x.device.type == "cpu" else pieces(x, w)


def pieces(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """integer_product for devices that have none: fp32 sums over as many columns as they hold exactly."""
    total = torch.zeros(len(x), len(w), dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[1], EXACT):
        part = slice(start, start + EXACT)
        total += functional.linear(x[:, part].float(), w[:, part].float()).int()
    return total


def reference(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x [M, K] and weight [N, K], both int8 or float8_e4m3fn; x_scale [M]; weight_scale, bias [N] -> [M, N] of dtype.

    Computes in int32 and fp32. Raises ValueError when sizes or dtypes do not fit."""
    check(x, x_scale, weight, weight_scale, bias)
    if x.dtype == torch.int8:
        y = integer_product(x, weight).float()
    else:
        y = functional.linear(x.float(), weight.float())
    y = y.mul_(x_scale.float()[:, None]).mul_(weight_scale.float())
    return (y if bias is None else y.add_(bias.float())).to(dtype)


scaled_linear = torch.library.custom_op("tessera::scaled_linear", reference, mutates_args=())
scaled_linear.register_fake(
    lambda x, x_scale, weight, weight_scale, bias, dtype: x.new_empty(len(x), len(weight), dtype=dtype)
)


@_jit
def scaled_product(
    X, W, XS, WS, BIAS, OUT, M, N, K, xm, wn, BIASED: tl.constexpr, FP8: tl.constexpr, BAND: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BM x BN of the result. Programs go down BAND tiles of rows before the next tile of columns."""
    across, down = tl.cdiv(N, BN), tl.cdiv(M, BM)
    band = tl.program_id(0) // (BAND * across)
    height = min(down - band * BAND, BAND)
    place = tl.program_id(0) % (BAND * across)
    rm = (band * BAND + place % height) * BM + tl.arange(0, BM)
    rn = (place // height) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    live_m, live_n = rm < M, rn < N
    x_at = X + rm.to(tl.int64)[:, None] * xm + rk[None, :]
    w_at = W + rn.to(tl.int64)[None, :] * wn + rk[:, None]
    acc = tl.zeros([BM, BN], tl.float32 if FP8 else tl.int32)
    for k in tl.range(0, K, BK):
        left = rk < K - k
        x = tl.load(x_at + k, mask=live_m[:, None] & left[None, :], other=0.0)
        w = tl.load(w_at + k, mask=live_n[None, :] & left[:, None], other=0.0)
        if FP8:
            acc = tl.dot(x, w, acc, max_num_imprecise_acc=BK)
        else:
            acc = tl.dot(x, w, acc, out_dtype=tl.int32)
    xs = tl.load(XS + rm, mask=live_m, other=0.0).to(tl.float32)
    ws = tl.load(WS + rn, mask=live_n, other=0.0).to(tl.float32)
    y = acc.to(tl.float32) * xs[:, None] * ws[None, :]
    if BIASED:
        y += tl.load(BIAS + rn, mask=live_n, other=0.0).to(tl.float32)[None, :]
    at = OUT + rm.to(tl.int64)[:, None] * N + rn[None, :]
    tl.store(at, y.to(OUT.dtype.element_ty), mask=live_m[:, None] & live_n[None, :])


def has_fp8(device: torch.device) -> bool:
    """Whether Triton has float8_e4m3fn there: from sm89 on."""
    name = _config.architecture(device)
    return name == "default" or (name.startswith("sm") and int(name[2:]) >= 89)


@on_gpu(scaled_linear)
def launch(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As reference, which serves fp8 on GPUs without it, and fp64."""
    check(x, x_scale, weight, weight_scale, bias)
    fp8 = x.dtype != torch.int8
    if dtype == torch.float64 or (fp8 and not has_fp8(x.device)):
        logging.getLogger("tessera").debug("scaled_linear: reference serves %s to %s", x.dtype, dtype)
        return reference(x, x_scale, weight, weight_scale, bias, dtype)
    (m, k), n = x.shape, len(weight)
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    if out.numel():
        x, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (x, weight))
        tuned = _config.lookup("scaled_linear_fp8" if fp8 else "scaled_linear", x, FEW if m <= FEW else MANY)
        bm, bn, bk = tuned["tile"]
        scaled_product[(triton.cdiv(m, bm) * triton.cdiv(n, bn),)](
            x, weight, x_scale.contiguous(), weight_scale.contiguous(), x_scale if bias is None else bias.contiguous(),
            out, m, n, k, x.stride(0), weight.stride(0), BIASED=bias is not None, FP8=fp8, BAND=BAND, BM=bm, BN=bn,
            BK=bk, num_warps=tuned["warps"], num_stages=tuned["stages"],
        )  # fmt: skip
    return out


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """A square layer of FLUX width in int8."""
    x, w = (torch.randint(-127, 128, (n, 3072), device=device, dtype=torch.int8) for n in (tokens, 3072))
    x_scale, w_scale = (torch.rand(n, device=device) / 1000 for n in (tokens, 3072))
    return x, x_scale, w, w_scale, torch.randn(3072, device=device).to(dtype), dtype


def aot_specs() -> list[dict]:
    """int8 and fp8, few and many rows."""
    args = {"XS": "*fp32", "WS": "*fp32", "BIAS": "*bf16", "OUT": "*bf16"} | dict.fromkeys(SIZES, "i32")
    found = []
    for kind, rows in (("i8", MANY), ("i8", FEW), ("fp8e4nv", MANY), ("fp8e4nv", FEW)):
        fp8 = kind != "i8"
        spec: Spec = {"kernel": "scaled_product", "args": args | {"X": f"*{kind}", "W": f"*{kind}"}}
        spec |= {"tag": f"{kind} rows {rows}", "unaligned": ("M", "N"), "extra": fp8 or rows == FEW}
        spec["expect"] = {"sm90": "QGMMA" if fp8 else "IGMMA"} if rows == MANY else {}
        spec |= {"targets": ("sm89", "sm90", "sm100", "sm120")} if fp8 else {}

        def const(tile, fp8=fp8):
            sizes = dict(zip(("BM", "BN", "BK"), tile, strict=True))
            return {"BIASED": True, "FP8": fp8, "BAND": BAND} | sizes

        found.append(configured(spec, "scaled_linear_fp8" if fp8 else "scaled_linear", 8, rows, const))
    return found
