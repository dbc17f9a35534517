"""How one weight was quantized, as files tell it: the tensors beside `<layer>.weight` and the JSON of `<layer>.comfy_quant`."""

import json
from collections.abc import Mapping
from typing import Any

import torch

from ...kernels.quant.packed import CODECS, Packed
from .rotation import Rotation

FORMAT = "tessera"
MARK = ".comfy_quant"
INTEGER = ("int4_g64", "svdquant_int4")  # formats whose tables hold whole numbers, for integer products
MOST = 4096  # bytes of one layer's JSON
MOST_BLOCK = 1024  # columns
BESIDE = {"scale": 2, "table": 1, "smooth": 1, "signs": 1, "permutation": 1, "down": 2, "up": 2}  # dimensions
NUMBERS = (torch.float32, torch.float16, torch.bfloat16)
ORDERS = (torch.int64, torch.int32)
ACTIVATIONS = ("none", "int8", "fp8", "int4")


def mark(recipe: Mapping[str, Any]) -> torch.Tensor:
    """The JSON as the uint8 tensor that ComfyUI reads, of a length after which the next tensor of a file is aligned."""
    text = json.dumps(dict(recipe)).encode()
    return torch.tensor(list(text + b" " * (-len(text) % 8)), dtype=torch.uint8)


def read_mark(file: str, layer: str, tensor: torch.Tensor) -> dict[str, Any]:
    """What a layer says of itself. ValueError naming file and layer where that is no small JSON object."""
    try:
        if tensor.dtype != torch.uint8 or tensor.ndim != 1 or tensor.numel() > MOST:
            raise ValueError
        found = json.loads(bytes(tensor.tolist()))
        if not isinstance(found, dict) or not isinstance(found.get("format"), str):
            raise ValueError
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file}: {layer}{MARK} does not say how the layer is quantized; the file is damaged, quantize or load it again."
        ) from error
    return found


def read_layer(file: str, layer: str, told: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> tuple[Packed, dict]:
    """(packed weight, what else its product needs) of a layer of our format; takes its tensors out of `tensors`.
    ValueError, one sentence with file, layer and sizes, where they do not fit what the layer says of itself."""
    data = tensors.pop(f"{layer}.weight", None)
    parts = {name: tensors.pop(f"{layer}.weight_{name}", None) for name in BESIDE}
    try:
        if data is None:
            raise ValueError("the weight itself is missing")
        for name, part in parts.items():
            if part is not None and part.ndim != BESIDE[name]:
                raise ValueError(f"weight_{name} is {[*part.shape]} where {BESIDE[name]} dimensions are needed")
            known = ORDERS if name == "permutation" else NUMBERS
            if part is not None and part.dtype not in known:
                raise ValueError(
                    f"weight_{name} is {str(part.dtype)[6:]} and none of {', '.join(str(d)[6:] for d in known)}"
                )
            if part is not None and part.is_floating_point() and not bool(part.isfinite().all()):
                raise ValueError(f"weight_{name} {[*part.shape]} is not finite")
        codec, group, columns = told.get("codec"), _count(told, "group"), _count(told, "columns")
        if codec not in CODECS:
            raise ValueError(f"the codec {codec!r} is none that is known ({', '.join(CODECS)})")
        if codec == "int8" and group > columns:
            raise ValueError(f"groups of {group} are longer than a row of {columns}")
        weight = Packed(codec, columns, data, parts.pop("scale"), parts.pop("table"), group)
        checked = _checked(told, columns, parts)
        if checked["name"] in INTEGER and not _whole(weight.table):
            raise ValueError(f"its table is not of whole numbers, which {checked['name']} has")
        return weight, {**checked, **parts}
    except ValueError as error:
        raise ValueError(f"{file}: layer {layer}: {str(error).rstrip('.')}; the file is damaged.") from error


def _checked(told: Mapping[str, Any], columns: int, parts: Mapping[str, torch.Tensor | None]) -> dict[str, Any]:
    kind = told.get("rotation", "none")
    block = _count(told, "block") if kind != "none" else 0
    activation = told.get("activation", "none")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activations {activation!r} are none that are known")
    if block and (columns % block or block > MOST_BLOCK):
        raise ValueError(f"rotated blocks of {block} do not divide {columns} columns")
    Rotation(kind, block or 1, parts["signs"], parts["permutation"])
    for name in ("smooth", "signs", "permutation"):
        if (part := parts[name]) is not None and len(part) != columns:
            raise ValueError(f"weight_{name} has {len(part)} values for {columns} columns")
    order = parts["permutation"]
    if order is not None and not torch.equal(order.long().sort().values, torch.arange(columns, device=order.device)):
        raise ValueError(f"weight_permutation does not hold each of {columns} columns once")
    signs, smooth = parts["signs"], parts["smooth"]
    if signs is not None and not bool((signs.abs() == 1).all()):
        raise ValueError("weight_signs are not all 1 or -1")
    if smooth is not None and not bool((smooth > 0).all()):
        raise ValueError("weight_smooth is not positive everywhere")
    return {"rotation": kind, "block": block, "activation": activation, "name": str(told.get("name", ""))[:32]}


def _whole(table: torch.Tensor | None) -> bool:
    return table is None or torch.equal(table.float(), table.float().round().clamp(-128, 127))


def _count(told: Mapping[str, Any], name: str) -> int:
    value = told.get(name)
    if type(value) is not int or not 0 < value < 1 << 24:
        raise ValueError(f"{name} is {value!r} and no number from 1 on")
    return value
