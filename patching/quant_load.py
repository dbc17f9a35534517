"""Quantized checkpoints as MODELs: our own files, ComfyUI's formats, GGUF, and nunchaku's releases."""

import logging
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import torch

from ..kernels.quant.packed import Packed
from ..methods.files.core_formats import check_layers
from ..methods.files.gguf_file import GgufFile
from ..methods.files.model_file import open_model
from ..methods.files.nunchaku_keys import is_nunchaku, plan
from ..methods.files.safetensors_file import SafetensorsFile
from ..methods.quant.recipe import FORMAT, MARK, read_layer, read_mark
from . import quant_parts
from .load_checks import Heard, check_config, check_marks, check_model
from .quant_branched import keep_loras_beside
from .quant_layout import quantized
from .quant_ops import operations, ours
from .quant_parts import together
from .quant_patcher import patched
from .sana_video_quant import is_sana_video
from .sana_video_quant import made as sana_video

log = logging.getLogger("tessera")
OWN = (FORMAT, quant_parts.FORMAT)
WEIGHTS = torch.bfloat16  # what packed weights stand for; products are formed in the dtype of the activations


def load(path: str, roots: tuple[str, ...] = (), disable_dynamic: bool = False) -> Any:
    """The MODEL of a quantized file that lies in one of the folders `roots`. ValueError, one sentence with the file's
    name, where it is damaged or of no known architecture."""
    name = Path(path).name
    tensors, metadata = _read(open_model(path, roots))
    own = any(ours(tensor) is not None for tensor in tensors.values())
    options = {"custom_operations": operations(_compute_dtype(), _emulated())} if own else {}
    check_config(name, metadata, len(tensors))
    try:
        with Heard() as heard:
            if is_sana_video(tensors):
                dtype = _compute_dtype()
                model = sana_video(name, tensors, metadata, operations(dtype, _emulated()), dtype, disable_dynamic)
            else:
                model = comfy.sd.load_diffusion_model_state_dict(
                    tensors, options, metadata, disable_dynamic=disable_dynamic
                )
    except (RuntimeError, ValueError) as error:  # sizes that do not fit the model, as torch or a layer says it
        raise ValueError(f"{name}: {' '.join(str(error).split())[:600]}") from error
    except (
        LookupError,
        AttributeError,
        TypeError,
        ArithmeticError,
    ) as error:  # of core's detection, by names and sizes
        raise ValueError(
            f"{name}: ComfyUI cannot tell a model by its tensors ({type(error).__name__}: {error}); the file is damaged."
        ) from error
    if model is None:
        raise ValueError(
            f"{name}: no diffusion transformer that this ComfyUI knows has these {len(tensors)} tensors (the first is "
            f"{next(iter(tensors), 'missing')}); load text encoders and VAEs with their own loaders."
        )
    check_model(name, model.model.diffusion_model, heard)
    model.cached_patcher_init = (load, (path, roots))
    beside = keep_loras_beside(model.model.diffusion_model)
    return patched(model) if own or beside else model


def _compute_dtype() -> torch.dtype:
    """Of what is not packed."""
    device = comfy.model_management.get_torch_device()
    return comfy.model_management.unet_manual_cast(WEIGHTS, device) or WEIGHTS


def _emulated() -> list[str]:
    """Core's formats that this device has no products for."""
    device = comfy.model_management.get_torch_device()
    fp8 = comfy.model_management.supports_fp8_compute(device)
    found = [] if fp8 else ["float8_e4m3fn", "float8_e5m2"]
    if not comfy.model_management.supports_nvfp4_compute(device):
        found.append("nvfp4")
    return found if comfy.model_management.supports_mxfp8_compute(device) else [*found, "mxfp8"]


def _read(file: SafetensorsFile | GgufFile) -> tuple[dict[str, Any], dict[str, str]]:
    """(tensors by ComfyUI's keys, those of our layouts made; metadata for ComfyUI)."""
    for warning in getattr(file, "warnings", ()):
        log.warning("%s", warning)
    if isinstance(file, GgufFile):
        return {k: quantized(v, WEIGHTS) if isinstance(v, Packed) else v for k, v in file.items()}, {}
    if is_nunchaku(file):
        return _nunchaku(file), {}
    check_layers(file, OWN)
    tensors, metadata = comfy.utils.convert_old_quants(dict(file), "", metadata=dict(file.metadata))
    for key in [k for k in tensors if k.endswith(MARK)]:
        layer = key[: -len(MARK)]
        told = read_mark(file.path.name, layer, tensors[key])
        if told["format"] in OWN:
            del tensors[key]
            tensors[f"{layer}.weight"] = _own(file.path.name, layer, told, tensors)
    check_marks(file.path.name, tensors)
    return tensors, metadata


def _nunchaku(file: SafetensorsFile) -> dict[str, Any]:
    """ComfyUI's keys, with one tensor of ours for each Linear that the file holds in parts."""
    layers = plan(file, file.path.name)
    tensors: dict[str, Any] = {key: layers.tensor(key, file) for key in layers.plain}
    for name, target in layers.linears.items():
        try:
            parts = layers.read(target, file)
            tensors[f"{name}.weight"] = together(parts, target.axis, WEIGHTS)
        except ValueError as error:
            raise ValueError(f"{file.path.name}: {name}: {error}") from error
        biases = [part.bias for part in parts if part.bias is not None]
        if biases:
            joined = torch.cat(biases) if target.axis == "rows" else torch.stack(biases).sum(0)
            tensors[f"{name}.bias"] = joined
    return tensors


def _own(file: str, layer: str, told: dict[str, Any], tensors: dict[str, Any]) -> Any:
    if told["format"] == quant_parts.FORMAT:
        return quant_parts.read(file, layer, told, tensors, WEIGHTS)
    weight, extra = read_layer(file, layer, told, tensors)
    for name, part in extra.items():
        if isinstance(part, torch.Tensor) and part.is_floating_point() != (name != "permutation"):
            raise ValueError(f"{file}: layer {layer}: weight_{name} is {str(part.dtype)[6:]}; the file is damaged.")
    try:
        return quantized(weight, WEIGHTS, **extra)
    except ValueError as error:
        raise ValueError(f"{file}: layer {layer}: {str(error).rstrip('.')}; the file is damaged.") from error
