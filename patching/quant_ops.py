"""ComfyUI's operations with a Linear that takes packed weights and keeps LoRA beside them, exactly.

Core would form the dense weight, add the LoRA and quantize again, which rounds a small LoRA away. Here what patches add to
a weight is taken apart into low-rank factors that run beside the packed product; a patch of full rank makes its layer
dense instead. So a LoRA on a quantized model is the LoRA on the dense one, in every offload mode.
"""

from collections.abc import Callable, Sequence
from typing import Any

import comfy.ops
import torch

from ..methods.quant.low_rank import low_rank_of
from ..methods.quant.recipe import mark
from . import quant_layout, quant_parts
from .low_rank import branch

LAYOUTS = {module.NAME: module for module in (quant_layout, quant_parts)}
MOST_RANK = 512  # above, a branch would cost what the dense layer does
NO_DENSE = (
    "A patch of full rank cannot be put on a layer {} of nunchaku's that shifts its activations; use a LoRA of low rank, or "
    "the model in another format."
)
LORA_TOLERANCE = 5e-4  # part of a patch's norm that its factors may leave out: below what bf16 weights round away
NOISE = 2**-22  # of the weight's norm: what adding a patch in fp32 rounds away, of full rank


def branch_of(weight: torch.Tensor, patched: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """fp32 (down, up) with up @ down = patched - weight, both [N, K] dense; None where that has no low rank."""
    most = min(MOST_RANK, min(weight.shape) // 2)
    delta = patched.float() - weight.float()
    noise = NOISE * float(weight.float().norm()) / max(float(delta.norm()), 1e-30)
    found = low_rank_of(delta, max(LORA_TOLERANCE, noise), most)
    return None if found is None else found[::-1]


def ours(weight: Any) -> Any:
    """The module of the layout that a weight has, of ours; None for every other weight."""
    return LAYOUTS.get(getattr(weight, "_layout_cls", None))


def operations(compute_dtype: torch.dtype, disabled: Sequence[str] = ()) -> type:
    """The class of operations for a model whose state dict holds packed weights as tensors of PackedLayout; core's own
    formats load as ever."""
    base = comfy.ops.mixed_precision_ops({}, compute_dtype, disabled=set(disabled))
    linear = type("Linear", (PackedLinear, base.Linear), {})
    return type("PackedOps", (base,), {"Linear": linear})


class PackedLinear:
    """What core's Linear does otherwise where its weight is packed; goes before it in the order of bases."""

    _lora = None  # (patches that are applied at each call, their factors)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        rest = local_metadata, strict, missing, unexpected, errors
        weight = state_dict.get(f"{prefix}weight")
        layout = ours(weight)
        if layout is None:
            if weight is not None and f"{prefix}comfy_quant" not in state_dict:
                _check_size(prefix, weight, self._orig_shape)
            super()._load_from_state_dict(state_dict, prefix, *rest)
            return
        state_dict.pop(f"{prefix}weight")
        _check_size(prefix, weight, self._orig_shape)
        self.quant_format, self.layout_type = layout.FORMAT, layout.NAME
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.weight._params = weight._params  # still views of the file: a Parameter holds copies of them
        torch.nn.Module._load_from_state_dict(self, state_dict, prefix, *rest)  # the bias
        if f"{prefix}weight" in missing:
            missing.remove(f"{prefix}weight")

    def state_dict(self, *args, destination=None, prefix="", **kwargs):
        found = super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
        layout = ours(self.weight)
        if layout is not None:
            found[f"{prefix}comfy_quant"] = mark(layout.described(self.weight))
        return found

    def _apply(self, fn, recurse=True):
        """Core wraps each weight anew, which torch refuses in inference mode for one that was loaded outside of it."""
        held = self._parameters.get("weight")
        if ours(held) is None:
            return super()._apply(fn, recurse)
        self._parameters["weight"] = None
        super()._apply(fn, recurse)
        moved = fn(held)
        if moved is not held:
            moved = moved.clone() if moved.is_inference() and not torch.is_inference_mode_enabled() else moved
            held = torch.nn.Parameter(moved, requires_grad=False)
        self._parameters["weight"] = held
        return self

    def is_ours(self) -> bool:
        """Whether it was loaded with a packed weight of ours, which a patch may have made dense meanwhile."""
        return getattr(self, "layout_type", None) in LAYOUTS

    def convert_weight(self, weight, inplace=False, **kwargs):
        """Core asks for fp16 on most devices: adding a LoRA there rounds the weight, and the difference has full rank."""
        if ours(weight) is None:
            return super().convert_weight(weight, inplace, **kwargs)
        return weight.to(dtype=torch.float32).dequantize()

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
        """weight: dense and patched. What the patches added goes into the branch of the packed weight."""
        if not self.is_ours():
            return super().set_weight(weight, inplace_update, seed, return_weight, **kwargs)
        made, layout = weight.to(self.weight.dtype), ours(self.weight)
        if layout is not None:
            before = self.weight.to(device=weight.device)
            factors = branch_of(before.to(dtype=torch.float32).dequantize(), weight)
            if factors is not None:
                made = layout.with_branch(before, *factors)
            elif layout.shifts(before):
                raise ValueError(NO_DENSE.format([*weight.shape]))
        if return_weight:
            return made
        self.weight = torch.nn.Parameter(made, requires_grad=False)
        return None

    def forward(self, input, *args, **kwargs):
        if not self.is_ours():
            return super().forward(input, *args, **kwargs)
        comfy.ops.run_every_op()
        with Untouched(self) as functions:
            weight, bias, stream = comfy.ops.cast_bias_weight(
                self, None, self.weight.dtype, input.device, bias_dtype=input.dtype, offloadable=True,
                compute_dtype=input.dtype, want_requant=True,
            )  # fmt: skip
        y = self._multiplied(input, weight, bias, functions)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return y

    def _multiplied(self, x, weight, bias, functions: tuple[Callable, ...]):
        linear, layout = torch.nn.functional.linear, ours(weight)
        if not functions:
            self._lora = None  # patches of an earlier run, and the LoRA that they hold
        if layout is None:
            return linear(x, _through(weight.to(x.dtype), functions), bias)
        if not functions:
            return layout.product(x, weight, bias)
        factors = self._factors(weight, functions)
        if factors is None:
            if layout.shifts(weight):
                raise ValueError(NO_DENSE.format([*weight.shape]))
            return linear(x, _through(weight.to(dtype=x.dtype).dequantize(), functions), bias)
        return layout.product(x, weight, bias) + branch(x, *factors)

    def _factors(self, weight, functions: tuple[Callable, ...]):
        if self._lora is None or self._lora[0] != functions:
            self._lora = functions, factors_of(weight, functions)
        return self._lora[1]


def factors_of(weight: Any, functions: tuple[Callable, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(down, up) of patches that are applied at each call; None where they are of high rank, or no LoRA of core's, whose
    effect might change from call to call."""
    if not all(getattr(f, "is_lowvram_patch", False) for f in functions):
        return None
    dense = weight.to(dtype=torch.float32).dequantize()
    return branch_of(dense, _through(dense.clone(), functions))  # core adds in place


def _check_size(prefix: str, weight: torch.Tensor, wanted: tuple[int, int]) -> None:
    if tuple(weight.shape) != tuple(wanted):
        raise ValueError(
            f"{prefix}weight is {[*weight.shape]} in the file where the model has {[*wanted]}; the file is of another model."
        )


def _through(weight: torch.Tensor, functions: Sequence[Callable]) -> torch.Tensor:
    for function in functions:
        weight = function(weight)
    return weight


class Untouched:
    """Takes a module's weight patches off while its weight is cast, so that core does not make it dense for them."""

    def __init__(self, module: Any):
        self.module = module

    def __enter__(self) -> tuple[Callable, ...]:
        self.lowvram = getattr(self.module, "weight_lowvram_function", None)
        self.functions = self.module.weight_function
        if self.lowvram is not None:
            self.module.weight_lowvram_function = None
        self.module.weight_function = []
        return (*(() if self.lowvram is None else (self.lowvram,)), *self.functions)

    def __exit__(self, *_: Any) -> None:
        self.module.weight_function = self.functions
        if self.lowvram is not None:
            self.module.weight_lowvram_function = self.lowvram
