"""LoRA beside weights in ComfyUI's own formats (fp8, nvfp4, mxfp8, int8), which core would quantize anew with the LoRA in it
and so round small ones away: a tensor that holds core's tensor as it is, and the low-rank factors."""

import functools
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from comfy_kitchen.tensor import BaseLayoutParams, QuantizedTensor, register_layout_class

from .low_rank import BranchLayout, added, branch, joined
from .quant_ops import Untouched, branch_of, factors_of, ours

NAME = "TesseraBranchedLayout"
saving: ContextVar[bool] = ContextVar("tessera_saving", default=False)


class BranchedLayout(BranchLayout):
    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """base: core's weight [N, K]; down [r, K], up [N, r]."""

        base: torch.Tensor | None = None
        down: torch.Tensor | None = None
        up: torch.Tensor | None = None

        def _tensor_fields(self) -> list[str]:
            return ["scale", "base", "down", "up"]

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: Params) -> torch.Tensor:
        return added(params.base.to(dtype=torch.float32).dequantize(), params)

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: Params) -> dict[str, torch.Tensor]:
        return params.base.state_dict() | {"_down": params.down, "_up": params.up}


register_layout_class(NAME, BranchedLayout)


def is_branched(weight: Any) -> bool:
    return getattr(weight, "_layout_cls", None) == NAME


def with_branch(weight: QuantizedTensor, down: torch.Tensor, up: torch.Tensor) -> QuantizedTensor:
    """The weight with down [r, K], up [N, r] beside it, and beside what lies there already."""
    base, sides = weight, {"down": down, "up": up}
    if is_branched(weight):
        base, sides = weight._params.base, joined(weight._params, down, up)
    nothing = torch.empty(0, dtype=torch.uint8, device=base._qdata.device)
    shape, dtype = tuple(base.shape), base.dtype
    params = BranchedLayout.Params(
        scale=nothing.float(), orig_dtype=dtype, orig_shape=shape, base=base, **sides
    )  # fmt: skip
    return QuantizedTensor(nothing, NAME, params)


class BranchedLinear:
    """What core's quantized Linear does otherwise with LoRA; goes before it in the order of bases."""

    _lora = None  # (patches that are applied at each call, their factors)

    def convert_weight(self, weight, inplace=False, **kwargs):
        """In fp32: core asks for fp16 on most devices, where the rounded sum hides a LoRA's low rank."""
        if isinstance(weight, QuantizedTensor):
            return weight.to(dtype=torch.float32).dequantize()
        return super().convert_weight(weight, inplace, **kwargs)

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
        factors = None
        if isinstance(self.weight, QuantizedTensor):
            before = self.weight.to(device=weight.device)
            factors = branch_of(before.to(dtype=torch.float32).dequantize(), weight)
        if factors is None:
            return self._requantized(weight, inplace_update, seed, return_weight, **kwargs)
        made = with_branch(before, *factors)
        if return_weight:
            return made
        self.weight = torch.nn.Parameter(made, requires_grad=False)
        return None

    def _requantized(self, weight, *args, **kwargs):
        """A patch of full rank: as core does it, from core's own tensor."""
        if not is_branched(self.weight):
            return super().set_weight(weight, *args, **kwargs)
        with Held(self, self.weight._params.base):
            made = super().set_weight(weight, *args[:2], True, **kwargs)
        if args[2]:
            return made
        self.weight = torch.nn.Parameter(made, requires_grad=False)
        return None

    def state_dict(self, *args, destination=None, prefix="", **kwargs):
        """While a model is saved, with the LoRA quantized into the weight, as core saves it: its own formats have no room
        for a branch. Elsewhere core only asks for sizes, again and again, and gets its own tensor."""
        if not is_branched(self.weight):
            return super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
        whole = self.weight._params.base
        if saving.get():
            dense = self.weight.to(dtype=torch.float32).dequantize()
            with Held(self, whole):
                whole = super().set_weight(dense, seed=0, return_weight=True)
        with Held(self, whole):
            return super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)

    def forward(self, input, *args, **kwargs):
        with Untouched(self) as functions:
            factors = self._factors(functions)
            if factors is not None or not functions:
                y = self._plain(input, *args, **kwargs)
        if not functions:
            self._lora = None
            return y
        if factors is None:
            return self._plain(input, *args, **kwargs)  # the patches are on again: dense, as core does it
        return y + branch(input, *factors)

    def _plain(self, input, *args, **kwargs):
        if not is_branched(self.weight):
            return super().forward(input, *args, **kwargs)
        params = self.weight._params
        with Held(self, params.base):
            return super().forward(input, *args, **kwargs) + branch(input, params.down, params.up)

    def _factors(self, functions):
        """(down, up) of LoRA that core applies at each call; None where there are none, or of high rank."""
        if not functions or not isinstance(self.weight, QuantizedTensor):
            return None
        if self._lora is None or self._lora[0] != functions:
            self._lora = functions, factors_of(self.weight, functions)
        return self._lora[1]


class Held:
    """Puts core's tensor in the place of the weight while the block lasts."""

    def __init__(self, module: Any, base: QuantizedTensor):
        self.module, self.base = module, base

    def __enter__(self) -> None:
        self.whole = self.module._parameters["weight"]
        self.module._parameters["weight"] = self.base

    def __exit__(self, *_: Any) -> None:
        self.module._parameters["weight"] = self.whole


@functools.cache
def _class(base: type) -> type:
    return type(base.__name__, (BranchedLinear, base), {})


def keep_loras_beside(model: Any) -> bool:
    """Makes every Linear of a diffusion model whose weight is in one of core's formats take LoRA beside it; whether there
    is any."""
    found = False
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, QuantizedTensor) and ours(weight) is None and hasattr(module, "in_features"):
            if not isinstance(module, BranchedLinear):
                module.__class__ = _class(type(module))
            found = True
    return found
