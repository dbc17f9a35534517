"""One weight in the format that was asked for: as the tensors and the recipe that a file holds."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import comfy.quant_ops  # noqa: F401 - registers core's layouts
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ..methods.quant.calibration import LayerStatistics
from ..methods.quant.codebook import check_weight
from ..methods.quant.formats import find
from ..methods.quant.layer import quantize_layer
from ..methods.quant.smooth import ALPHAS
from .quant_layout import described, quantized

CORE = {  # format: (core's name, layout, arguments of quantize)
    "fp8_e4m3": ("float8_e4m3fn", "TensorCoreFP8E4M3Layout", {"scale": "recalculate"}),
    "nvfp4": ("nvfp4", "TensorCoreNVFP4Layout", {}),
    "mxfp8": ("mxfp8", "TensorCoreMXFP8Layout", {}),
}


@dataclass(frozen=True)
class Asked:
    """What Quantize Model was asked for. group 0: the format's own. smoothing: with a calibration only."""

    format: str
    activations: str = "none"
    rotation: str = "auto"
    smoothing: bool = True
    group: int = 0
    rank: int = 32

    def __post_init__(self):
        known = find(self.format)
        known.check_activations(self.activations)
        known.check_group(self.group or None)
        if self.rotation not in ("auto", "none") and not known.rotates:
            raise ValueError(
                f"{self.format} is loaded by ComfyUI itself, which knows no {self.rotation}; choose auto or none."
            )

    def told(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Made:
    """tensors: by name below the layer. error: relative squared error of the weight. numbers: weights; bytes: of all that
    was made of them. how: rotation and smoothing, for people."""

    tensors: dict[str, torch.Tensor]
    recipe: dict[str, Any]
    error: float
    numbers: int
    bytes: int
    how: str = "none"
    errors: dict[str, float] = field(default_factory=dict)

    def without_tensors(self) -> "Made":
        return replace(self, tensors={})


def made(weight: torch.Tensor, asked: Asked, known: LayerStatistics | None) -> Made:
    """weight [N, K] fp32, on the device where it is quantized. ValueError, one sentence, for what cannot be."""
    if asked.format in CORE:
        return _core(weight, asked)
    layer = quantize_layer(
        weight, asked.format, asked.activations, asked.group or None, asked.rotation,
        ALPHAS if asked.smoothing else (), known, asked.rank,
    )  # fmt: skip
    turn = layer.rotation
    found = quantized(
        layer.packed, torch.bfloat16, smooth=layer.smooth, rotation=turn.kind,
        block=turn.block if turn.kind != "none" else 0, signs=turn.signs, permutation=turn.permutation,
        activation=layer.activations, up=layer.up, down=layer.down, name=asked.format,
    )  # fmt: skip
    how = turn.kind + ("" if layer.smooth is None else ", smoothed")
    errors = layer.choice.errors if layer.choice is not None else {}
    return _told(found.state_dict("weight"), described(found), weight, layer.weight(), how, errors)


def _core(weight: torch.Tensor, asked: Asked) -> Made:
    name, layout, arguments = CORE[asked.format]
    check_weight(weight)
    plain = weight.to(torch.bfloat16)
    silent = not bool(plain.any())  # its scale would be 0, and 0 / 0 no number
    found = QuantizedTensor.from_float(torch.ones_like(plain) if silent else plain, layout, **arguments)
    if silent:
        found._qdata.zero_()
    recipe: dict[str, Any] = {"format": name}
    if asked.format == "fp8_e4m3" and asked.activations == "none":
        recipe["full_precision_matrix_mult"] = True
    return _told(found.state_dict("weight"), recipe, weight, found.dequantize().float(), "none", {})


def _told(tensors, recipe, weight: torch.Tensor, near: torch.Tensor, how: str, errors: dict[str, float]) -> Made:
    size = float(weight.square().sum(dtype=torch.float64))
    error = float((near - weight).square().sum(dtype=torch.float64)) / max(size, 1e-30)
    tensors = {key: tensor.cpu() for key, tensor in tensors.items()}
    return Made(tensors, recipe, error, weight.numel(), sum(t.nbytes for t in tensors.values()), how, errors)
