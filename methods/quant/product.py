"""The product of a layer with its packed weight: y = q(rotate(x / smooth)) Wq' + b, and the weight as the original x sees it."""

from typing import Any

import torch

from ...kernels.quant.packed import Packed
from ...kernels.quant.packed_linear import packed_linear
from ...kernels.quant.quantize_rows import quantize_rows
from ...kernels.quant.scaled_linear import scaled_linear
from ...kernels.quant.scaled_packed_linear import scaled_packed_linear
from .recipe import INTEGER
from .rotation import Rotation, family_of

CODES = {"int8": "int8", "int4": "int4", "fp8": "fp8_e4m3"}


def rotation_of(params: Any) -> Rotation:
    return Rotation(params.rotation, params.block or 1, params.signs, params.permutation)


def prepared(x: torch.Tensor, params: Any) -> torch.Tensor:
    """x [..., K] as the packed weight takes it. params: smooth [K] or None, rotation, block, signs, permutation."""
    if params.smooth is not None:
        x = x / params.smooth.to(x)
    return rotation_of(params).apply(x)


def restored(weight: torch.Tensor, params: Any) -> torch.Tensor:
    """What multiplies the original x, of the weight [N, K] that multiplies the prepared one."""
    weight = rotation_of(params).undo(weight)
    return weight if params.smooth is None else weight / params.smooth.to(weight)


def multiply(x: torch.Tensor, weight: Packed, bias: torch.Tensor | None, params: Any) -> torch.Tensor:
    """x [..., K] -> [..., N] in x's dtype. params.name: the format; integers are multiplied as such."""
    parts = weight.data, weight.scale, weight.table
    told = weight.codec, weight.columns, weight.group
    if params.activation == "none":
        return packed_linear(prepared(x, params), *parts, bias, *told)
    codes, scales = quantize_rows(x, CODES[params.activation], *_turned(x, params))
    if codes.dtype == torch.int8 and weight.scale is not None:
        if weight.codec == "int8" and weight.group >= weight.columns:
            y = scaled_linear(codes, scales, weight.data.view(torch.int8), weight.scale[:, 0], bias, x.dtype)
            return y.view(*x.shape[:-1], -1)
        if params.name in INTEGER:
            return scaled_packed_linear(codes, scales, *parts, bias, *told, x.dtype).view(*x.shape[:-1], -1)
    rows = (codes.to(x.dtype) * scales[:, None].to(x.dtype)).view(x.shape)
    return packed_linear(rows, *parts, bias, *told)


def _turned(x: torch.Tensor, params: Any) -> tuple:
    """What quantize_rows does before it rounds: multiplier, permutation, signs, block, kind."""
    multiplier = None if params.smooth is None else params.smooth.float().reciprocal()
    if params.rotation == "none":
        return multiplier, params.permutation, None, 1, "regular"
    return multiplier, params.permutation, params.signs, params.block, family_of(params.rotation)
