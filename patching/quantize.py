"""Quantize Model: the weights of a MODEL, one layer at a time, into a safetensors file and from there into a MODEL."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_detection
import comfy.model_management
import torch

from .. import archs
from ..methods.files.header import read_header
from ..methods.files.safetensors_write import SafetensorsWriter
from ..methods.quant.calibration import Statistics
from ..methods.quant.keep_list import select
from ..methods.quant.recipe import MARK, mark
from .forwards import cleared
from .quant_layer import Asked, Made, made
from .quant_load import load
from .quant_patcher import PackedPatcher, patched
from .sampling import Progress
from .sizes import fingerprint
from .weights import plain_weight

NAME = "Quantize Model"
INSIDE = "diffusion_model."
ABOUT = "tessera_quantization"  # metadata key: what the file was made from, and how


@dataclass
class Result:
    """What became of each layer."""

    layers: dict[str, Made] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)  # why
    bytes: int = 0
    bytes_before: int = 0  # of the quantized layers, at 16 bits

    def lines(self, name: str) -> list[str]:
        packed = sum(m.bytes for m in self.layers.values())
        worst = sorted(self.layers.items(), key=lambda item: -item[1].error)[:3]
        total = sum(m.error * m.numbers for m in self.layers.values()) / max(
            sum(m.numbers for m in self.layers.values()), 1
        )
        return [
            f"{name}: {len(self.layers)} layers quantized, {len(self.kept)} left as they are, {self.bytes / 1e6:.1f} MB",
            f"quantized layers: {packed / max(self.bytes_before, 1):.3f} of their size in 16 bits, mean relative squared error {total:.3g}",
            "largest errors: " + ", ".join(f"{layer} {m.error:.3g}" for layer, m in worst),
        ]


def quantize(model: Any, asked: Asked, statistics: Statistics | None, path: Path, exclude: str, existing: str):
    """(MODEL of the file, lines of a report). existing: what to do with a file of that name: "refuse", "replace", or
    "reuse" where it was made from this MODEL in the same way. ValueError, one sentence with the remedy, before anything
    is written, where the MODEL cannot be quantized."""
    cleared(model)
    _check(model, statistics)
    about = _about(model, asked, statistics, exclude)
    if path.exists() and existing != "replace":
        known = _known(path)
        if existing == "reuse" and known == about and not model.patches:
            return _like(load(str(path)), model), [f"{path.name} was made from this model in the same way: it is used."]
        why = "holds something else" if existing == "reuse" else "exists"
        if existing == "reuse" and model.patches:
            why = "cannot be told to hold the LoRAs of this MODEL and exists"
        raise ValueError(f"{path.name} {why} already. Choose another filename, or set existing to replace.")
    result = write(model, asked, statistics, path, exclude, about)
    return _like(load(str(path)), model), result.lines(path.name)


def write(model: Any, asked: Asked, statistics: Statistics | None, path: Path, exclude: str, about: str) -> Result:
    """Layer by layer: beside the MODEL, one weight in fp32 is held at a time."""
    weights = model.model.diffusion_model.state_dict()
    arch = archs.find(model.model.diffusion_model)
    found = select(weights, "" if arch is None else arch.home, exclude or None)
    chosen = set(found.chosen)
    if not chosen:
        raise ValueError(
            f"{NAME} found no layer to quantize: {_why(found.kept)}. `exclude` takes the place of the own list."
        )
    result = Result(kept=found.kept)
    progress = Progress(len(chosen))
    device = comfy.model_management.get_torch_device()
    metadata = {ABOUT: about, **_config(model, weights)}
    with SafetensorsWriter(path, metadata, len(weights) + 9 * len(chosen)) as out:
        for name in weights:
            layer = name.removesuffix(".weight")
            whole = _weight(model, name, device if layer in chosen and name != layer else None)
            if layer not in chosen or name == layer:
                out.add(name, whole)
                continue
            known = None if statistics is None else statistics.for_layer(layer, whole.shape[1])
            try:
                done = made(whole, asked, known)
            except ValueError as error:
                raise ValueError(f"{layer}: {error}") from error
            for key, tensor in done.tensors.items():
                out.add(f"{layer}.{key}", tensor)
            out.add(layer + MARK, mark(done.recipe))
            result.layers[layer] = done.without_tensors()
            result.bytes_before += 2 * whole.numel()
            progress.step()
        result.bytes = out.bytes
    return result


def _weight(model: Any, name: str, device: torch.device | None) -> torch.Tensor:
    """With its LoRA, in its own dtype; in fp32 on the device where it is to be quantized."""
    key = INSIDE + name
    found = plain_weight(model, key).detach()
    if key in model.patches:
        exact = found.to(device=device or model.offload_device, dtype=torch.float32, copy=True)
        exact = comfy.lora.calculate_weight(model.patches[key], exact, key)
        found = exact if device is not None else exact.to(found.dtype)
    return found if device is None else found.to(device=device, dtype=torch.float32)


def _check(model: Any, statistics: Statistics | None) -> None:
    packed = [n for n, p in model.model.diffusion_model.named_parameters() if type(p.data) is not torch.Tensor]
    if packed:
        raise ValueError(f"This MODEL is quantized already ({packed[0]}). Load it in full precision.")
    inside = [k for k, patch in model.object_patches.items() if k.startswith(INSIDE) and not unbound(patch)]
    if inside:
        raise ValueError(
            f"{NAME} takes the plain weights, but this MODEL carries other modules in their place ({inside[0]}). Connect it "
            "before the node that put them there."
        )

    known = fingerprint(model)
    if statistics is not None and statistics.model != known:
        raise ValueError(
            f"The calibration was recorded with the model {statistics.model} and this one is {known}. Run Calibrate "
            "Quantization on this MODEL."
        )


def unbound(patch: Any) -> bool:
    """Whether an object patch holds nothing of the model that it is on, so that it may move to another."""
    return isinstance(patch, bool | int | float | str) or getattr(patch, "unbound", False)


def _about(model: Any, asked: Asked, statistics: Statistics | None, exclude: str) -> str:
    told = asked.told() | {"exclude": exclude, "model": fingerprint(model)}
    if model.patches:
        told["patched"] = True  # no file of the plain MODEL, nor of other LoRA
    if statistics is not None:
        told["calibration"] = [statistics.model, statistics.steps, statistics.sampler]
    return json.dumps(told, sort_keys=True)


def _known(path: Path) -> str | None:
    try:
        return read_header(path).metadata.get(ABOUT)
    except ValueError:
        return None


def _config(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, str]:
    """What the shapes of the weights do not tell ComfyUI of the model, in the form that it reads."""
    config = model.model.model_config
    wanted = {**type(config).unet_config, **config.unet_config}
    found = comfy.model_detection.detect_unet_config(dict(weights), "", metadata=None) or {}
    missing = {k: v for k, v in wanted.items() if k not in found or found[k] != v}
    plain = {k: v for k, v in missing.items() if isinstance(v, (bool, int, float, str, list, tuple))}
    return {"config": json.dumps({"transformer": plain})} if plain else {}


def _like(fresh: Any, model: Any) -> Any:
    """The loaded MODEL with all that earlier nodes set on this one, except the LoRA, which are in its weights."""
    made = model.clone(model_override=fresh.get_clone_model_override())
    made.patches, made.patches_uuid = {}, fresh.patches_uuid
    made.cached_patcher_init, made.clone_base_uuid = fresh.cached_patcher_init, fresh.clone_base_uuid
    made.parent, made.size = None, 0  # of the other model
    made = patched(made) if isinstance(fresh, PackedPatcher) else made
    made.model_size()
    return made


def _why(kept: dict[str, str]) -> str:
    return next((f"{layer} {reason}" for layer, reason in kept.items()), "it has no Linear layers")
