"""The product of a layer with its packed weight: y = q(rotate(x / smooth)) Wq' + b, and the weight as the original x sees it."""

from typing import Any

import torch

from ...kernels.quant.packed import Packed
from ...kernels.quant.packed_linear import packed_linear
from .rotation import Rotation
from .round_trip import activations


def rotation_of(params: Any) -> Rotation:
    return Rotation(params.rotation, params.block or 1, params.signs, params.permutation)


def prepared(x: torch.Tensor, params: Any) -> torch.Tensor:
    """x [..., K] as the packed weight takes it. params: smooth [K] or None, rotation, block, signs, permutation."""
    if params.smooth is not None:
        x = x / params.smooth.to(x)
    return x if params.rotation == "none" else rotation_of(params).apply(x)


def folded(weight: torch.Tensor, params: Any) -> torch.Tensor:
    """weight [N, K] as it is packed: the product with prepared(x) is that of weight with x."""
    if params.smooth is not None:
        weight = weight * params.smooth.to(weight)
    return weight if params.rotation == "none" else rotation_of(params).apply(weight)


def restored(weight: torch.Tensor, params: Any) -> torch.Tensor:
    """The inverse of `folded`."""
    if params.rotation != "none":
        weight = rotation_of(params).undo(weight)
    return weight if params.smooth is None else weight / params.smooth.to(weight)


def multiply(x: torch.Tensor, weight: Packed, bias: torch.Tensor | None, params: Any) -> torch.Tensor:
    """x [..., K] -> [..., N] in x's dtype."""
    rows = activations(prepared(x, params), params.activation)
    return packed_linear(
        rows, weight.data, weight.scale, weight.table, bias, weight.codec, weight.columns, weight.group
    )
