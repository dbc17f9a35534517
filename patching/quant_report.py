"""Quantization Report: how each layer is stored, what it costs, and which product will really run on this device."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.quant_ops
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ..kernels._triton import triton
from ..kernels.quant.packed import GGUF_BLOCKS
from ..methods.quant.recipe import INTEGER
from . import quant_layout, quant_parts
from .forwards import cleared
from .quant_branched import is_branched
from .weights import plain_weight

NATIVE = {  # core's layouts: whether the device multiplies in them
    "TensorCoreFP8E4M3Layout": ("fp8_e4m3", comfy.model_management.supports_fp8_compute),
    "TensorCoreFP8Layout": ("fp8_e4m3", comfy.model_management.supports_fp8_compute),
    "TensorCoreFP8E5M2Layout": ("fp8_e5m2", comfy.model_management.supports_fp8_compute),
    "TensorCoreNVFP4Layout": ("nvfp4", comfy.model_management.supports_nvfp4_compute),
    "TensorCoreMXFP8Layout": ("mxfp8", comfy.model_management.supports_mxfp8_compute),
    "TensorWiseINT8Layout": ("int8_tensorwise", None),
    "TensorCoreConvRotW4A4Layout": ("convrot_w4a4", None),
}


@dataclass(frozen=True)
class Row:
    """One layer. bits: of a weight, all that is stored of it counted. path: "native" (the device multiplies in the
    format), "fused" (our kernel decodes on the way), "decoded" (a dense copy for each call), "dense"."""

    layer: str
    format: str
    bits: float
    bytes: int
    path: str
    why: str
    error: float | None = None

    def told(self) -> dict[str, Any]:
        return vars(self) | {"bits": round(self.bits, 3)}


def rows_of(model: Any) -> list[Row]:
    """Every Linear weight of the diffusion model, on the device where it will run."""
    device, found = model.load_device, []
    for name, module in cleared(model).diffusion_model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2 and hasattr(module, "in_features"):
            weight = plain_weight(model, f"diffusion_model.{name}.weight")
            found.append(
                row_of(name, module, weight.data if not isinstance(weight, QuantizedTensor) else weight, device)
            )
    return found


def row_of(name: str, module: Any, weight: torch.Tensor, device: torch.device) -> Row:
    weight = weight._params.base if is_branched(weight) else weight
    numbers = max(weight.numel(), 1)
    if not isinstance(weight, QuantizedTensor):
        size = weight.numel() * weight.element_size()
        return Row(name, str(weight.dtype)[6:], 8 * size / numbers, size, "dense", "it is not quantized")
    size = sum(t.nbytes for t in weight.state_dict().values())
    format, path, why = _path(module, weight, device)
    return Row(name, format, 8 * size / numbers, size, path, why)


def _path(module: Any, weight: QuantizedTensor, device: torch.device) -> tuple[str, str, str]:
    params = weight._params
    if weight._layout_cls == quant_layout.NAME:
        return _packed(params, device)
    if weight._layout_cls == quant_parts.NAME:
        kinds = "+".join(sorted({part.kind for part in params.parts}))
        return f"nunchaku {kinds}", *_kitchen(weight, device)
    format, supported = NATIVE.get(weight._layout_cls, (weight._layout_cls, None))
    if getattr(module, "_full_precision_mm", False):
        why = (
            "the file asks for activations in full precision"
            if getattr(module, "_full_precision_mm_config", False)
            else (f"{_device(device)} does not multiply in {format}")
        )
        return format, "decoded", why
    if supported is not None and not supported(device):
        return format, "decoded", f"{_device(device)} does not multiply in {format}"
    if supported is None:
        return format, *_kitchen(weight, device)
    return format, "native", f"{_device(device)} multiplies in {format}"


def _packed(params: Any, device: torch.device) -> tuple[str, str, str]:
    groups = "one scale a row" if params.group >= params.columns else f"groups of {params.group}"
    name = params.codec.upper() if params.codec in GGUF_BLOCKS else f"{params.name or params.codec} ({groups})"
    turned = "" if params.rotation == "none" else f", {params.rotation}"
    rounded = "" if params.activation == "none" else f", activations {params.activation}"
    format = name + turned + rounded
    if not _ours_run(device):
        return format, "decoded", f"{_device(device)} runs the torch reference: each call decodes the weight, in parts"
    if params.activation in ("int8", "int4") and (params.codec == "int8" or params.name in INTEGER):
        return format, "native", f"{_device(device)} multiplies the codes as int8"
    why = "up to 64 rows are multiplied while they are decoded; above, a dense copy of one layer is made for each call"
    return format, "fused", why + ": less memory, not more speed"


def _kitchen(weight: QuantizedTensor, device: torch.device) -> tuple[str, str]:
    if not weight.layout_cls.supports_fast_matmul() or device.type != "cuda":
        return "decoded", f"{_device(device)} has no kernel of comfy_kitchen's for it: its torch reference runs"
    known = comfy.quant_ops.ck.list_backends()
    if not any(known.get(name, {}).get("available") and not known[name].get("disabled") for name in ("cuda", "triton")):
        return (
            "decoded",
            "comfy_kitchen's fast backends are off (they need CUDA 13 builds of torch): its torch reference runs",
        )
    return "native", f"comfy_kitchen's kernel runs on {_device(device)}"


def _ours_run(device: torch.device) -> bool:
    return device.type == "cuda" and hasattr(triton, "__version__")


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"this {device.type.upper()}"


def with_errors(rows: list[Row], model: Any, plain: Any) -> list[Row]:
    """The rows with the relative squared error of each weight against the same layer of another MODEL."""
    found = []
    for row in rows:
        key = f"diffusion_model.{row.layer}.weight"
        try:
            want = plain_weight(plain, key)
        except AttributeError as error:
            raise ValueError(f"The plain MODEL has no {row.layer}; it is of another architecture.") from error
        got = plain_weight(model, key)
        if tuple(want.shape) != tuple(got.shape):
            raise ValueError(
                f"{row.layer} is {[*got.shape]} here and {[*want.shape]} in the plain MODEL; connect the one it was made from."
            )
        a, b = (t.dequantize() if isinstance(t, QuantizedTensor) else t for t in (got, want))
        a, b = a.float().cpu(), b.float().cpu()
        found.append(replace(row, error=float((a - b).square().sum() / b.square().sum().clamp_min(1e-30))))
    return found


def lines_of(rows: list[Row]) -> list[str]:
    """A summary, and a line for each kind of layer."""
    quantized = [r for r in rows if r.path != "dense"]
    size, whole = sum(r.bytes for r in rows), sum(r.bytes for r in rows if r.path == "dense")
    lines = [
        f"{len(quantized)} of {len(rows)} Linear layers are quantized; {size / 1e6:.1f} MB, of which {whole / 1e6:.1f} MB dense"
    ]
    kinds = Counter((r.format, r.path, r.why) for r in quantized)
    for (format, path, why), count in kinds.most_common():
        own = [r for r in quantized if (r.format, r.path, r.why) == (format, path, why)]
        bits = 8 * sum(r.bytes for r in own) / sum(8 * r.bytes / r.bits for r in own)
        errors = [r.error for r in own if r.error is not None]
        worst = f", squared error {sum(errors) / len(errors):.3g} (worst {max(errors):.3g})" if errors else ""
        lines.append(f"{format}: {count} layers, {bits:.2f} bits{worst}; {path}: {why}")
    return lines
