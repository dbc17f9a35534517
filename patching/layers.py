"""Networks whose layers are torch's own, put into ComfyUI's hands: built without memory, filled from files, layers exchanged
for those whose weights ComfyUI can offload, cast and patch one by one."""

from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.ops
import torch

from ..networks.sana_layers import FrameConv, GatedDepthConv, PointConv


class CastTokens(comfy.ops.CastWeightBiasOp):
    """Before a convolution over tokens in the order of bases: its weights come as ComfyUI keeps and patches them."""

    comfy_cast_weights = True
    product: Any

    def forward(self, x, *where):
        comfy.ops.run_every_op()
        weight, bias, stream = comfy.ops.cast_bias_weight(self, x, offloadable=True)
        out = self.product(weight, bias, x, *where)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return out


SWAPPED: dict[type, type] = {  # layers whose weights ComfyUI can offload, cast and patch one by one
    torch.nn.Linear: comfy.ops.manual_cast.Linear,
    torch.nn.Conv2d: comfy.ops.manual_cast.Conv2d,
    torch.nn.Conv3d: comfy.ops.manual_cast.Conv3d,
    torch.nn.LayerNorm: comfy.ops.manual_cast.LayerNorm,
    torch.nn.RMSNorm: comfy.ops.manual_cast.RMSNorm,
    torch.nn.Embedding: comfy.ops.manual_cast.Embedding,
    **{kind: type(kind.__name__, (CastTokens, kind), {}) for kind in (PointConv, GatedDepthConv, FrameConv)},
}
DTYPES = {"default": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def swap_layers(model: torch.nn.Module) -> None:
    """Turns plain layers of torch into those of ComfyUI, in place."""
    for module in model.modules():
        ours = SWAPPED.get(type(module))
        if ours is not None:
            module.__class__ = ours
            if getattr(module, "bias", None) is None:
                module.bias = None


def quantizable(model: torch.nn.Module, operations: Any) -> None:
    """Turns plain layers into ComfyUI's, in place, Linears into those of `operations`, which take packed weights."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is torch.nn.Linear:
                made = operations.Linear(child.in_features, child.out_features, child.bias is not None)
                setattr(module, name, made)
    swap_layers(model)


@contextmanager
def unplaced():
    """Parameters made inside go to the meta device at once; buffers, which hold tables, stay. For one thread only, as
    ComfyUI's nodes run."""
    register = torch.nn.Module.register_parameter

    def on_meta(module, name, parameter):
        if parameter is not None:
            parameter = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def choose_dtype(family, weights: dict[str, torch.Tensor], asked: torch.dtype | None, device) -> torch.dtype:
    """The dtype of the weights, and in the family what they are computed in."""
    count, management = sum(w.numel() for w in weights.values()), comfy.model_management
    own = max({w.dtype for w in weights.values()}, key=lambda kind: sum(w.dtype == kind for w in weights.values()))
    supported = list(family.supported_inference_dtypes)
    dtype = asked or management.unet_dtype(model_params=count, supported_dtypes=supported, weight_dtype=own)
    family.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, supported), device=device)
    return dtype


def place(model: Any, weights: dict[str, torch.Tensor], dtype: torch.dtype, computed: torch.dtype) -> None:
    """The weights into the model: of layers that ComfyUI casts in `dtype`, others as they are computed, and in fp32 what
    the class keeps so."""
    kept = getattr(type(model), "_keep_in_fp32_modules", None) or ()
    cast = {
        f"{path}.{name}"
        for path, layer in model.named_modules()
        if type(layer) in SWAPPED
        for name in layer._parameters
    }
    for key in list(weights):
        own = dtype if key in cast else computed
        weights[key] = weights[key].to(torch.float32 if any(part in key.split(".") for part in kept) else own)
    model.load_state_dict(weights, strict=True, assign=True)
    model.weight_dtype = dtype
    model.requires_grad_(False)
    model.eval()
    swap_layers(model)
