"""Layers of nunchaku's releases as tensors: several SVDQuant or AWQ layers that make up one Linear of ComfyUI, multiplied by
comfy_kitchen's own kernels.

A part is "svd": y = Q((x + shift) / smooth) W' + x down up', or "awq": y = x ((q - 8) scale + zeros)'. Parts lie side by
side, by their outputs ("rows") or their inputs ("columns", outputs added), flat one after the other in one tensor a kind.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from comfy_kitchen.tensor import (
    BaseLayoutParams,
    QuantizedTensor,
    TensorCoreAWQW4A16Layout,
    TensorCoreSVDQuantW4A4Layout,
    register_layout_class,
)

from ..methods.files.nunchaku_layout import GROUP, AwqLinear, SvdLinear
from ..methods.quant.recipe import NUMBERS
from .low_rank import BranchLayout, added, branch, fits, joined
from .quant_layout import register_products

LINEAR = torch.ops.aten.linear.default  # called on kitchen's layout: torch may take linear apart before it gets there
NAME = "TesseraPartsLayout"
FORMAT = "tessera_parts"
FLAT = ("scale", "zeros", "smooth", "proj_down", "proj_up", "down", "up")


@dataclass(frozen=True)
class Part:
    """kind: "svd" or "awq", of a weight [rows, columns]; rank: of its branch; unsigned: whether activations are shifted."""

    kind: str
    rows: int
    columns: int
    rank: int = 0
    unsigned: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers in each flat tensor."""
        scales = self.rows * self.columns // GROUP
        if self.kind == "awq":
            return {"data": self.rows * self.columns // 2, "scale": scales, "zeros": scales}
        return {
            "data": self.rows * self.columns // 2, "scale": scales, "smooth": self.columns,
            "proj_down": self.columns * self.rank, "proj_up": self.rows * self.rank,
        }  # fmt: skip


class PartsLayout(BranchLayout):
    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """scale, zeros, smooth, proj_down, proj_up: flat. down [r, K], up [N, r]: what LoRA add."""

        axis: str = "rows"
        parts: tuple[Part, ...] = ()
        zeros: torch.Tensor | None = None
        smooth: torch.Tensor | None = None
        proj_down: torch.Tensor | None = None
        proj_up: torch.Tensor | None = None
        down: torch.Tensor | None = None
        up: torch.Tensor | None = None
        transposed: bool = False

        def _tensor_fields(self) -> list[str]:
            return [name for name in FLAT if getattr(self, name) is not None]

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: Params) -> torch.Tensor:
        """What multiplies the original x: [N, K] in orig_dtype, without the constant that shifted activations add."""
        dense = [_natural(p, found).dense()[0] for p, found in _split(qdata, params)]
        return added(torch.cat(dense, dim=0 if params.axis == "rows" else 1), params)

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: Params) -> dict[str, torch.Tensor]:
        return {"": qdata} | {f"_{name}": getattr(params, name) for name in params._tensor_fields()}


register_layout_class(NAME, PartsLayout)


def _split(qdata: torch.Tensor, params: PartsLayout.Params) -> list[tuple[Part, dict[str, torch.Tensor]]]:
    """Each part with its tensors, views of the flat ones."""
    flat = {"data": qdata} | {
        name: getattr(params, name) for name in ("scale", "zeros", "smooth", "proj_down", "proj_up")
    }
    at = dict.fromkeys(flat, 0)
    found = []
    for part in params.parts:
        own = {}
        for name, size in part.sizes.items():
            own[name] = flat[name][at[name] : at[name] + size]
            at[name] += size
        found.append((part, own))
    return found


def _natural(part: Part, t: dict[str, torch.Tensor]) -> SvdLinear | AwqLinear:
    rows, columns = part.rows, part.columns
    data, scale = t["data"].view(rows, columns // 2), t["scale"].view(columns // GROUP, rows)
    if part.kind == "awq":
        return AwqLinear(data, scale, t["zeros"].view(columns // GROUP, rows), None)
    down, up = t["proj_down"].view(columns, part.rank), t["proj_up"].view(rows, part.rank)
    return SvdLinear(data, scale, t["smooth"], down, up, None, part.unsigned)


def together(parts: list[SvdLinear | AwqLinear], axis: str, dtype: torch.dtype) -> QuantizedTensor:
    """One weight [N, K] of its parts. ValueError where they do not fit side by side."""
    told, flat = [], {}
    for part in parts:
        rows, columns = part.qweight.shape[0], part.qweight.shape[1] * 2
        own = {"data": part.qweight, "scale": part.scale}
        if isinstance(part, AwqLinear):
            own["zeros"] = part.zeros
            told.append(Part("awq", rows, columns))
        else:
            own |= {"smooth": part.smooth, "proj_down": part.down, "proj_up": part.up}
            told.append(Part("svd", rows, columns, part.down.shape[1], part.unsigned))
        for name, tensor in own.items():
            flat.setdefault(name, []).append(tensor.reshape(-1))
    joined = {name: torch.cat(tensors) if len(tensors) > 1 else tensors[0] for name, tensors in flat.items()}
    return assembled(joined.pop("data"), joined, axis, tuple(told), dtype)


def assembled(
    data: torch.Tensor, flat: dict[str, torch.Tensor], axis: str, parts: tuple[Part, ...], dtype
) -> QuantizedTensor:
    """The tensor of flat data. ValueError where sizes do not fit the parts."""
    across = {p.columns if axis == "rows" else p.rows for p in parts}
    if len(across) != 1:
        raise ValueError(
            f"Parts of {sorted(across)} {'inputs' if axis == 'rows' else 'outputs'} do not fit side by side."
        )
    for name, tensor in {"data": data, **flat}.items():
        wanted = sum(p.sizes.get(name, 0) for p in parts)
        if tensor.numel() != wanted and name not in ("down", "up"):
            raise ValueError(f"weight_{name} holds {tensor.numel()} numbers where {wanted} are needed.")
    length = sum(p.rows if axis == "rows" else p.columns for p in parts)
    shape = (length, *across) if axis == "rows" else (*across, length)
    return QuantizedTensor(
        data, NAME, PartsLayout.Params(orig_dtype=dtype, orig_shape=shape, axis=axis, parts=parts, **flat)
    )


def _kitchen(part: Part, natural: SvdLinear | AwqLinear, dtype: torch.dtype) -> QuantizedTensor:
    """comfy_kitchen's own tensor of a part, scales in the dtype of the activations."""
    shape = (part.rows, part.columns)
    if isinstance(natural, AwqLinear):
        params = TensorCoreAWQW4A16Layout.Params(
            scale=natural.scale.to(dtype), orig_dtype=dtype, orig_shape=shape, zeros=natural.zeros.to(dtype)
        )
        return QuantizedTensor(natural.qweight, "TensorCoreAWQW4A16Layout", params)
    params = TensorCoreSVDQuantW4A4Layout.Params(
        scale=natural.scale.to(dtype), orig_dtype=dtype, orig_shape=shape, proj_down=natural.down.to(dtype),
        proj_up=natural.up.to(dtype), smooth_factor=natural.smooth.to(dtype), act_unsigned=part.unsigned,
    )  # fmt: skip
    return QuantizedTensor(natural.qweight, "TensorCoreSVDQuantW4A4Layout", params)


@torch.compiler.disable  # it makes comfy_kitchen's tensors, which a traced graph cannot
def product(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] -> [..., N]."""
    params, at, outputs = weight._params, 0, []
    for part, tensors in _split(weight._qdata, params):
        inputs = x if params.axis == "rows" else x[..., at : at + part.columns]
        at += part.columns
        own = _kitchen(part, _natural(part, tensors), x.dtype)
        outputs.append(QuantizedTensor.__torch_dispatch__(LINEAR, (QuantizedTensor,), (inputs.contiguous(), own)))
    y = torch.cat(outputs, dim=-1) if params.axis == "rows" else sum(outputs[1:], outputs[0])
    if params.up is not None:
        y = y + branch(x, params.down, params.up)
    return y if bias is None else y + bias.to(y)


def with_branch(weight: QuantizedTensor, down: torch.Tensor, up: torch.Tensor) -> QuantizedTensor:
    """The weight with down [r, K], up [N, r] added to what LoRA add."""
    params = weight._params
    return QuantizedTensor(weight._qdata, NAME, dataclasses.replace(params, **joined(params, down, up)))


def described(weight: QuantizedTensor) -> dict[str, Any]:
    params = weight._params
    return {"format": FORMAT, "axis": params.axis, "parts": [dataclasses.asdict(p) for p in params.parts]}


def read(
    file: str, layer: str, told: dict[str, Any], tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> QuantizedTensor:
    """A layer that `described` and state_dict_tensors saved; takes its tensors out. ValueError naming file and layer."""
    flat = {name: t for name in FLAT if (t := tensors.pop(f"{layer}.weight_{name}", None)) is not None}
    data = tensors.pop(f"{layer}.weight", None)
    try:
        if data is None or data.dtype != torch.int8 or data.ndim != 1 or told.get("axis") not in ("rows", "columns"):
            raise ValueError("its packed weight is missing or no flat int8")
        parts = tuple(Part(**one) for one in told["parts"])
        if not parts or not all(_known(p) for p in parts):
            raise ValueError(f"its parts {told['parts']!r:.200} are none that are known")
        _check_flat(flat, parts)
        made = assembled(data, flat, told["axis"], parts, dtype)
        if not fits(flat.get("down"), flat.get("up"), *made.shape):
            raise ValueError(f"weight_down and weight_up do not make up {[*made.shape]}")
        return made
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: layer {layer}: {error}; the file is damaged.") from error


def _known(part: Part) -> bool:
    """Whether a part is one that can be multiplied."""
    sizes = part.rows, part.columns, part.rank
    whole = all(type(size) is int and size >= 0 for size in sizes) and type(part.unsigned) is bool
    return part.kind in ("svd", "awq") and whole and part.rows > 0 < part.columns and part.columns % GROUP == 0


def _check_flat(flat: dict[str, torch.Tensor], parts: tuple[Part, ...]) -> None:
    """ValueError for a tensor that the parts need and that is missing, and for one that is no list of finite numbers."""
    needed = {name for p in parts for name in p.sizes} - {"data"}
    if needed - flat.keys():
        raise ValueError(f"weight_{min(needed - flat.keys())} is missing")
    for name, tensor in flat.items():
        wide = 2 if name in ("down", "up") else 1
        if tensor.dtype not in NUMBERS or tensor.ndim != wide or not bool(tensor.isfinite().all()):
            raise ValueError(
                f"weight_{name} {str(tensor.dtype)[6:]} {[*tensor.shape]} is not {wide}-d of finite floats"
            )


def shifts(weight: QuantizedTensor) -> bool:
    """Whether a dense weight could not stand for it: the shift of its activations is no part of the weight."""
    return any(part.unsigned for part in weight._params.parts)


register_products(PartsLayout, NAME, product)
