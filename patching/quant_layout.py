"""Packed weights as tensors that ComfyUI moves, offloads, clones and saves: comfy_kitchen's QuantizedTensor with our layout.

What such a weight means: y = prepare(x) Wq^T + (x down^T) up^T + b with prepare(x) = rotate(x / smooth). The low-rank
branch takes the original x; SVDQuant's correction and the LoRA that lie on the weight are in it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy_kitchen.tensor import (
    BaseLayoutParams,
    QuantizedLayout,
    QuantizedTensor,
    dequantize_args,
    register_layout_class,
    register_layout_op,
)

from ..kernels.quant.packed import Packed, decode
from ..methods.quant.product import multiply, restored
from ..methods.quant.recipe import FORMAT
from .low_rank import BranchLayout, added, branch, fits, joined

NAME = "TesseraPackedLayout"
TENSORS = ("scale", "table", "smooth", "signs", "permutation", "down", "up")


class PackedLayout(BranchLayout):
    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """scale [N, groups], an empty tensor where the codec has none. table [2**bits]. smooth, signs, permutation: [K].
        down [r, K], up [N, r]. rotation: the kind, in blocks of `block` columns. activation: how rows of prepare(x) are
        quantized."""

        codec: str = "table4"
        group: int = 64
        columns: int = 0
        table: torch.Tensor | None = None
        smooth: torch.Tensor | None = None
        signs: torch.Tensor | None = None
        permutation: torch.Tensor | None = None
        down: torch.Tensor | None = None
        up: torch.Tensor | None = None
        rotation: str = "none"
        block: int = 0
        activation: str = "none"
        name: str = ""  # of the format, for people
        transposed: bool = False

        def _tensor_fields(self) -> list[str]:
            return [name for name in TENSORS if getattr(self, name) is not None]

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: Params) -> torch.Tensor:
        """What multiplies the original x: [N, K] in orig_dtype."""
        return added(restored(decode(packed(qdata, params)), params), params)

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: Params) -> dict[str, torch.Tensor]:
        found = {"": qdata}
        for name in params._tensor_fields():
            if getattr(params, name).numel():
                found[f"_{name}"] = getattr(params, name)
        return found


register_layout_class(NAME, PackedLayout)


def packed(qdata: torch.Tensor, params: PackedLayout.Params) -> Packed:
    scale = params.scale if params.scale.numel() else None
    return Packed(params.codec, params.columns, qdata, scale, params.table, params.group)


def quantized(weight: Packed, dtype: torch.dtype, **extra: Any) -> QuantizedTensor:
    """The weight as a tensor [N, K] of `dtype`. extra: smooth, rotation, block, signs, permutation, activation, down, up.
    ValueError where one of them has another size."""
    rows, columns = weight.data.shape[0], weight.columns
    up, down = extra.get("up"), extra.get("down")
    if not fits(down, up, rows, columns):
        raise ValueError(
            f"The low-rank branch has up {_shape(up)} and down {_shape(down)}; a weight [{rows}, {columns}] needs "
            f"[{rows}, r] and [r, {columns}]."
        )
    scale = weight.scale if weight.scale is not None else weight.data.new_empty(0, dtype=torch.float32)
    params = PackedLayout.Params(
        scale=scale, orig_dtype=dtype, orig_shape=(rows, columns), codec=weight.codec, group=weight.group,
        columns=columns, table=weight.table, **extra,
    )  # fmt: skip
    return QuantizedTensor(weight.data, NAME, params)


def _shape(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else [*tensor.shape]


def is_packed(weight: Any) -> bool:
    return isinstance(weight, QuantizedTensor) and weight._layout_cls == NAME


def with_branch(weight: QuantizedTensor, down: torch.Tensor, up: torch.Tensor) -> QuantizedTensor:
    """The weight with down [r, K], up [N, r] added to its branch."""
    params = weight._params
    return QuantizedTensor(weight._qdata, NAME, dataclasses.replace(params, **joined(params, down, up)))


def product(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] -> [..., N]."""
    params = weight._params
    y = multiply(x, packed(weight._qdata, params), bias, params)
    return y if params.up is None else y + branch(x, params.down, params.up)


def described(weight: QuantizedTensor) -> dict[str, Any]:
    """What a file says of a packed weight beside its tensors."""
    params = weight._params
    told = {"format": FORMAT, "codec": params.codec, "group": params.group, "columns": params.columns}
    if params.rotation != "none":
        told |= {"rotation": params.rotation, "block": params.block}
    if params.name:
        told["name"] = params.name
    return told | ({"activation": params.activation} if params.activation != "none" else {})


def shifts(weight: QuantizedTensor) -> bool:
    """Whether a dense weight could not stand for it."""
    return False


def register_products(layout: type[QuantizedLayout], name: str, product: Callable[..., torch.Tensor]) -> None:
    """torch's linear by product(x, weight, bias), also as the t, mm and addmm that autograd makes of it."""
    linear = torch.nn.functional.linear

    def mine(x: Any, weight: Any, transposed: bool) -> bool:
        known = isinstance(weight, QuantizedTensor) and weight._layout_cls == name
        return known and weight._params.transposed == transposed and not isinstance(x, QuantizedTensor)

    def turned(weight: QuantizedTensor) -> QuantizedTensor:
        params = weight._params
        shape = params.orig_shape[::-1]
        return QuantizedTensor(
            weight._qdata, name, dataclasses.replace(params, orig_shape=shape, transposed=not params.transposed)
        )

    @register_layout_op(torch.ops.aten.linear.default, layout)
    def _linear(_, args: Sequence[Any], kwargs: Any) -> torch.Tensor:
        x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
        return product(x, weight, bias) if mine(x, weight, False) else linear(*dequantize_args((x, weight, bias)))

    @register_layout_op(torch.ops.aten.t.default, layout)
    def _t(_, args: Sequence[Any], kwargs: Any) -> QuantizedTensor:
        return turned(args[0])

    @register_layout_op(torch.ops.aten.mm.default, layout)
    def _mm(_, args: Sequence[Any], kwargs: Any) -> torch.Tensor:
        x, weight = args
        return product(x, turned(weight), None) if mine(x, weight, True) else torch.mm(*dequantize_args((x, weight)))

    @register_layout_op(torch.ops.aten.addmm.default, layout)
    def _addmm(_, args: Sequence[Any], kwargs: Any) -> torch.Tensor:
        bias, x, weight = args
        if mine(x, weight, True) and not kwargs:
            return product(x, turned(weight), bias)
        return torch.addmm(*dequantize_args(tuple(args)), **kwargs)


register_products(PackedLayout, NAME, product)
