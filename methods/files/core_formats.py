"""Layers that a safetensors file declares as quantized in ComfyUI's own formats, checked before ComfyUI builds them: it
pops tensors by name, casts what has another dtype, and meets wrong sizes only in the product.

A layer's settings are JSON in the metadata `_quantization_metadata` ({"layers": {layer: {"format": ...}}}) or in a uint8
tensor `<layer>.comfy_quant` (ComfyUI 0.30 comfy/ops.py `_load_quantized_module`, comfy/utils.py `convert_old_quants`).
Scales of nvfp4 and mxfp8 lie in tiles of 128 x 4 (cuBLAS); uint8 stands for the 8-bit floats in older files."""

import json
from collections.abc import Callable, Collection
from typing import Any

import torch

from .finite import check_scales
from .place import Damaged, shown
from .safetensors_file import SafetensorsFile

MOST_JSON = 1 << 26
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
E8M0 = getattr(torch, "float8_e8m0fnu", torch.uint8)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ONE: tuple[int, ...] = ()
Shapes = Callable[[int, int], tuple[tuple[int, ...], ...]]


def _tiles(rows: int, groups: int) -> tuple[int, int]:
    return -(-rows // 128) * 128, -(-groups // 4) * 4


# format: (dtype of the weight, {tensor: (dtypes, shapes that fit a stored weight [N, C])})
FORMATS: dict[str, tuple[torch.dtype, dict[str, tuple[tuple[torch.dtype, ...], Shapes]]]] = {
    "float8_e4m3fn": (E4M3, {"weight_scale": (FLOATS, lambda n, c: (ONE, (1,)))}),
    "float8_e5m2": (E5M2, {"weight_scale": (FLOATS, lambda n, c: (ONE, (1,)))}),
    "nvfp4": (
        torch.uint8,
        {
            "weight_scale": ((E4M3, torch.uint8), lambda n, c: (_tiles(n, c // 8),)),
            "weight_scale_2": (FLOATS, lambda n, c: (ONE, (1,))),
        },
    ),
    "mxfp8": (E4M3, {"weight_scale": ((E8M0, torch.uint8), lambda n, c: (_tiles(n, c // 32),))}),
    "int8_tensorwise": (torch.int8, {"weight_scale": (FLOATS, lambda n, c: (ONE, (1,), (n,), (n, 1)))}),
    "convrot_w4a4": (torch.int8, {"weight_scale": (FLOATS, lambda n, c: ((n,), (n, 1)))}),
}
STEPS = {"nvfp4": (16, 8), "mxfp8": (32, 32), "convrot_w4a4": (1, 128)}  # rows and columns as stored come in these


def check_layers(file: SafetensorsFile, own: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Settings by layer. Layers of the formats in `own` are the caller's and not looked at. ValueError, one sentence with
    the file's and the tensor's name, for settings, names, dtypes and shapes that do not fit each other."""
    layers = _settings(file)
    for layer, told in layers.items():
        kind = told.get("format")
        if kind in own:
            continue
        if not isinstance(kind, str) or kind not in FORMATS:
            raise Damaged(
                file.path.name,
                f"layer {shown(layer)} has the format {ascii(kind)[:60]}; known are {', '.join(FORMATS)}",
            )
        _check(file, layer, kind, told)
    return layers


def _settings(file: SafetensorsFile) -> dict[str, dict[str, Any]]:
    """Of every layer, from the metadata or from the tensors."""
    layers: Any = {}
    if text := file.metadata.get("_quantization_metadata"):
        whole = _json(file.path.name, "its _quantization_metadata", text)
        layers = whole.get("layers")
        if not isinstance(layers, dict) or not all(isinstance(told, dict) for told in layers.values()):
            raise Damaged(file.path.name, "its _quantization_metadata names no layers with their formats")
    for key in file:
        if key.endswith(".comfy_quant"):
            tensor = file[key]
            if tensor.dtype != torch.uint8 or tensor.numel() > 1 << 16:
                raise Damaged(
                    file.path.name, f"tensor {shown(key)} {[*tensor.shape]} is not a layer's settings as JSON"
                )
            layers[key.removesuffix(".comfy_quant")] = _json(
                file.path.name, f"tensor {shown(key)}", bytes(tensor.reshape(-1).tolist())
            )
    return layers


def _json(file: str, what: str, text: str | bytes) -> dict[str, Any]:
    if len(text) > MOST_JSON:
        raise Damaged(file, f"{what} has {len(text):,} characters, at most {MOST_JSON:,} are read")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(file, f"{what} is not JSON") from error
    if not isinstance(found, dict):
        raise Damaged(file, f"{what} is JSON of a {type(found).__name__} and not of an object")
    return found


def _check(file: SafetensorsFile, layer: str, kind: str, told: dict[str, Any]) -> None:
    name, entries = file.path.name, file.header.tensors
    dtype, needed = FORMATS[kind]
    weight = entries.get(f"{layer}.weight")
    if weight is None:
        raise Damaged(
            name, f"its settings name layer {shown(layer)} as {kind}, and it has no tensor {shown(layer)}.weight"
        )
    if "num_experts" in told and weight.dtype == dtype and len(weight.shape) == 3:
        return  # a bank of experts: ComfyUI's own module checks its sizes
    if weight.dtype != dtype or len(weight.shape) != 2:
        raise Damaged(
            name, f"tensor {shown(layer)}.weight must be {str(dtype)[6:]} [N, K] for {kind}, got {_told(weight)}"
        )
    rows, columns = weight.shape
    by_rows, by_columns = STEPS.get(kind, (1, 1))
    if rows % by_rows or columns % by_columns:
        raise Damaged(
            name,
            f"tensor {shown(layer)}.weight {[*weight.shape]} is not in multiples of {by_rows} x {by_columns} for {kind}",
        )
    for suffix, (dtypes, shapes) in needed.items():
        key = f"{layer}.{suffix}"
        entry = entries.get(key)
        if entry is None:
            raise Damaged(name, f"layer {shown(layer)} is {kind} and lacks the tensor {shown(key)}")
        if entry.dtype not in dtypes or entry.shape not in shapes(rows, columns):
            fits = " or ".join(str([*shape]) for shape in shapes(rows, columns))
            raise Damaged(
                name, f"tensor {shown(key)} must be {str(dtypes[0])[6:]} {fits} for {kind}, got {_told(entry)}"
            )
        if entry.dtype == torch.uint8:  # floats under another name, which opening the file did not look at
            check_scales(name, key, file[key].view(dtypes[0]))
    parameters = told.get("params") if isinstance(told.get("params"), dict) else {}
    group = told.get("convrot_groupsize", parameters.get("convrot_groupsize", 256))  # type: ignore[union-attr]
    rotated = kind == "convrot_w4a4" or told.get("convrot", parameters.get("convrot", False))  # type: ignore[union-attr]
    inputs = 2 * columns if kind == "convrot_w4a4" else columns
    if rotated and (type(group) is not int or group < 1 or inputs % group):
        raise Damaged(name, f"layer {shown(layer)} has {inputs} inputs and is rotated in groups of {ascii(group)[:40]}")


def _told(entry) -> str:
    return f"{str(entry.dtype)[6:]} {[*entry.shape]}"
