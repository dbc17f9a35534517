"""LinFusion's modules in the place of a UNet's self-attention: an object patch on every attn1, and the weights as one
additional model, which core loads, counts and unloads with the MODEL."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch

from .. import archs
from ..methods.attention.linfusion import LinearSelfAttention, Module, build, modules_of
from ..methods.weight_files import read_weights
from .run import Feature, attach, current_forward

MODELS = "tessera_linfusion"  # key of the additional model


@dataclass
class Calls:
    """What the modules did in one run."""

    linear: int = 0
    plain: int = 0  # calls left to softmax: below min_tokens, or masked


@dataclass(frozen=True, eq=False)
class LinFusionFeature(Feature):
    name: str = "Load LinFusion"
    modules: int = 0

    def begin(self, run) -> Calls:
        return Calls()

    def conflicts(self, other: Feature) -> str | None:
        if isinstance(other, LinFusionFeature):
            return "Load LinFusion is on this MODEL already. Remove one of the two."
        return None

    def facts(self, state: Calls) -> dict[str, Any]:
        return {"modules": self.modules, "linear": state.linear, "plain": state.plain}

    def line(self, facts: dict[str, Any]) -> str:
        if not facts:
            return ""
        total = facts["linear"] + facts["plain"]
        return f"{facts['linear']} of {total} self-attention calls linear, in {facts['modules']} modules"


class LinFusionForward:
    """Stands in for the forward of one attn1."""

    def __init__(self, original, module: LinearSelfAttention, feature: LinFusionFeature, min_tokens: int):
        self.original, self.module, self.feature, self.min_tokens = original, module, feature, min_tokens

    def __call__(self, x, context=None, value=None, mask=None, **rest):
        forward = current_forward.get()
        calls = Calls() if forward is None else forward.run.states.get(self.feature, Calls())
        if x.shape[1] < self.min_tokens or mask is not None:
            calls.plain += 1
            return self.original(x, context=context, value=value, mask=mask, **rest)
        calls.linear += 1
        context = x if context is None else context
        return self.module(x, context, context if value is None else value)


def files(path: str) -> tuple[list[Module], dict[str, torch.Tensor]]:
    """The modules and weights of a safetensors file with its config.json (or NAME.json) beside it."""
    there = [Path(path).with_suffix(".json"), Path(path).with_name("config.json")]
    config = next((p for p in there if p.is_file()), None)
    if config is None:
        raise ValueError(f"LinFusion needs its config.json beside {path}: copy it from where the weights came from.")
    return modules_of(config.read_text()), read_weights(path, "download it again from where it came from")[0]


def paths(modules: list[Module], model: Any) -> list[str]:
    """Where each module belongs in this UNet, e.g. input_blocks.1.1.transformer_blocks.0.attn1. ValueError where it
    has no such place, or one of another size."""
    diffusion_model, known = (
        model.model.diffusion_model,
        comfy.utils.unet_to_diffusers(model.model.model_config.unet_config),
    )
    if not known:
        raise ValueError(
            f"LinFusion is for the UNet of Stable Diffusion 1.5, 2.1 and XL; {archs.class_name(diffusion_model)} is none."
        )
    found: list[str] = []
    for module in modules:
        key = known.get(f"{module.module_name}.to_q.weight")
        if key is None or not module.module_name.endswith(".attn1"):
            raise ValueError(
                f"This UNet has no self-attention {module.module_name}: the file is for another base model."
            )
        path = key.removesuffix(".to_q.weight")
        if path in found:
            raise ValueError(
                f"This config.json names {module.module_name} twice; copy it again from where the weights came from."
            )
        attn = comfy.utils.get_attr(diffusion_model, path)
        have, want = (attn.to_q.in_features, attn.heads), (module.dim_n, module.heads)
        if have != want:
            raise ValueError(
                f"{module.module_name} has {have[0]} channels in {have[1]} heads here, this LinFusion file {want[0]} in "
                f"{want[1]}: it is for another base model."
            )
        found.append(path)
    return found


def load(model: Any, path: str, node: str | None = None, min_tokens: int = 0) -> Any:
    """The MODEL with the modules of that file."""
    modules, weights = files(path)
    places = paths(modules, model)
    built = build(modules, weights, comfy.ops.manual_cast).eval().requires_grad_(False)
    feature = LinFusionFeature(node, modules=len(modules))
    patched = attach(model, feature)
    for place, module in zip(places, built, strict=True):
        name = f"diffusion_model.{place}.forward"
        patched.add_object_patch(name, LinFusionForward(patched.get_model_object(name), module, feature, min_tokens))
    patched.set_additional_models(
        MODELS,
        [
            comfy.model_patcher.ModelPatcher(
                built,
                load_device=model.load_device,
                offload_device=comfy.model_management.unet_offload_device(),
            )
        ],
    )
    return patched
