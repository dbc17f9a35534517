"""The product of a layer with its packed weight: y = q(rotate(x / smooth)) Wq' + b, and the weight as the original x sees it."""

from typing import Any

import torch

from ...kernels.quant.packed import Packed
from ...kernels.quant.packed_linear import packed_linear
from ...kernels.quant.quantize_rows import quantize_rows
from ...kernels.quant.rotate import rotate
from .rotation import Rotation, family_of

CODES = {"int8": "int8", "int4": "int4", "fp8": "fp8_e4m3"}


def rotation_of(params: Any) -> Rotation:
    return Rotation(params.rotation, params.block or 1, params.signs, params.permutation)


def prepared(x: torch.Tensor, params: Any) -> torch.Tensor:
    """x [..., K] as the packed weight takes it. params: smooth [K] or None, rotation, block, signs, permutation."""
    if params.smooth is not None:
        x = x / params.smooth.to(x)
    if params.permutation is not None:
        x = x.index_select(-1, params.permutation)
    if params.rotation == "none":
        return x
    return rotate(x, params.signs, params.block, family_of(params.rotation))


def restored(weight: torch.Tensor, params: Any) -> torch.Tensor:
    """What multiplies the original x, of the weight [N, K] that multiplies the prepared one."""
    if params.rotation != "none":
        weight = rotation_of(params).undo(weight)
    return weight if params.smooth is None else weight / params.smooth.to(weight)


def multiply(x: torch.Tensor, weight: Packed, bias: torch.Tensor | None, params: Any) -> torch.Tensor:
    """x [..., K] -> [..., N] in x's dtype."""
    rows = prepared(x, params) if params.activation == "none" else _rounded(x, params)
    return packed_linear(
        rows, weight.data, weight.scale, weight.table, bias, weight.codec, weight.columns, weight.group
    )


def _rounded(x: torch.Tensor, params: Any) -> torch.Tensor:
    """prepared(x) after its rounding, for weights that no integer product takes."""
    codes, scales = quantize_rows(x, CODES[params.activation], *_turned(x, params))
    return (codes.to(x.dtype) * scales[:, None].to(x.dtype)).view(x.shape)


def _turned(x: torch.Tensor, params: Any) -> tuple:
    """What quantize_rows does before it rounds: multiplier, permutation, signs, block, kind."""
    multiplier = None if params.smooth is None else params.smooth.float().reciprocal()
    if params.rotation == "none":
        return multiplier, params.permutation, None, 1, "regular"
    return multiplier, params.permutation, params.signs, params.block, family_of(params.rotation)
