"""What quantized numbers come back as: activations per token, and the weights of every format, for measuring errors.

The formats of ComfyUI's core are followed by their definitions, not by its kernels: fp8_e4m3 has one scale max / 448;
nvfp4 E2M1 in blocks of 16 with E4M3 scales and one fp32 scale max / (448 * 6); mxfp8 E4M3 in blocks of 32 with
power-of-two scales.
"""

import torch

from ...kernels.quant.packed import Packed, decode
from .codebook import ROUNDS, TINY, Fit, check_weight, column_weights, rowwise_int8, symmetric_int4, twin_log, weighted

ACTIVATIONS = ("none", "int8", "fp8", "int4")
LEVELS = {"int8": 127, "int4": 7}
E4M3, E2M1 = 448.0, 6.0
BITS = {"tlq4": 4, "tlq3": 3}
PACKED = (*BITS, "int4_g64", "int8_row", "svdquant_int4")  # the formats of our own codecs; of svdquant's, the residual


def activations(x: torch.Tensor, kind: str) -> torch.Tensor:
    """x [..., K] after rounding with one scale a token (max / 127, / 448 or / 7), in x's dtype."""
    if kind == "none":
        return x
    if kind not in ACTIVATIONS:
        raise ValueError(f"Unknown activations {kind!r}. Known are {', '.join(ACTIVATIONS)}.")
    y = x.float()
    peak = y.abs().amax(-1, keepdim=True).clamp_min(TINY)
    if kind == "fp8":
        scale = peak / E4M3
        return (_e4m3(y / scale) * scale).to(x.dtype)
    scale = peak / LEVELS[kind]
    return ((y / scale).round_().clamp_(-LEVELS[kind], LEVELS[kind]) * scale).to(x.dtype)


def quantize(
    weight: torch.Tensor,
    format: str,
    group: int = 64,
    importance: torch.Tensor | None = None,
    rounds: int = ROUNDS,
) -> tuple[Packed, Fit]:
    """(Packed, Fit) of weight [N, K] in one of our own formats; group and rounds of the refit where it has them."""
    if format in BITS:
        return twin_log(weight, BITS[format], group, importance, rounds=rounds)
    if format in ("int4_g64", "svdquant_int4"):
        return symmetric_int4(weight, group, importance, search=format == "svdquant_int4")
    if format == "int8_row":
        return rowwise_int8(weight, importance)
    raise ValueError(f"{format!r} is not one of our codecs, which are {', '.join(PACKED)}.")


def weights(
    weight: torch.Tensor,
    format: str,
    group: int = 64,
    importance: torch.Tensor | None = None,
    rounds: int = ROUNDS,
) -> tuple[torch.Tensor, Fit]:
    """What weight [N, K] comes back as, fp32, and its Fit. "none" is the weight itself."""
    if format in PACKED:
        packed, fit = quantize(weight, format, group, importance, rounds)
        return decode(packed), fit
    check_weight(weight)
    w = weight.float()
    if format == "none":
        return w, Fit(0.0, 0.0, 8.0 * weight.element_size())
    if format not in CORE:
        raise ValueError(f"Unknown format {format!r}. Known are {', '.join((*PACKED, *CORE))}.")
    near, bits = CORE[format](w)
    h = column_weights(importance, weight, weight.shape[1])
    plain = weighted(w - near, None) / max(weighted(w, None), TINY)
    return near, Fit(plain, plain if h is None else weighted(w - near, h) / max(weighted(w, h), TINY), bits)


def _e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-E4M3, E4M3).to(torch.float8_e4m3fn).float()


def _fp8(w: torch.Tensor) -> tuple[torch.Tensor, float]:
    scale = (w.abs().max() / E4M3).clamp_min(TINY)
    return _e4m3(w / scale) * scale, 8.0


def _blocks(w: torch.Tensor, size: int) -> torch.Tensor:
    return torch.nn.functional.pad(w, (0, -w.shape[1] % size)).reshape(w.shape[0], -1, size)


def _nvfp4(w: torch.Tensor) -> tuple[torch.Tensor, float]:
    blocks = _blocks(w, 16)
    whole = (w.abs().max() / (E4M3 * E2M1)).clamp_min(TINY)
    scale = _e4m3(blocks.abs().amax(-1, keepdim=True) / E2M1 / whole) * whole
    u = blocks / scale.clamp_min(TINY)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=w.device)
    size, halves = u.abs(), (values[1:] + values[:-1]) / 2
    low, high = (torch.bucketize(size, halves, right=right) for right in (False, True))
    near = values[torch.where(low % 2 == 0, low, high)] * u.sign()  # a half goes to the even code
    return (near * scale).flatten(1)[:, : w.shape[1]], 4.5


def _mxfp8(w: torch.Tensor) -> tuple[torch.Tensor, float]:
    blocks = _blocks(w, 32)
    peak = blocks.abs().amax(-1, keepdim=True)
    scale = torch.exp2((peak / E4M3).clamp_min(2.0**-127).log2().ceil())
    return (_e4m3(blocks / scale) * scale).flatten(1)[:, : w.shape[1]], 8.25


CORE = {"fp8_e4m3": _fp8, "nvfp4": _nvfp4, "mxfp8": _mxfp8}  # formats that ComfyUI's core loads
