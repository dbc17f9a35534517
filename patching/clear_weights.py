"""CLEAR's weights on a MODEL: projections as weight patches, the rest for Local Window Attention to find in the run."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.utils
import torch

from .. import archs
from ..methods.attention.clear_weights import ClearWeights, read
from ..methods.attention.local_window import LocalWindow
from ..methods.weight_files import read_weights
from .attention import AttentionFeature
from .run import Feature, attach

log = logging.getLogger("tessera")


@dataclass(frozen=True, eq=False)
class ClearFeature(Feature):
    """What was loaded. patch_weights: block number -> fp32 [s, s], by which LocalWindow pools keys."""

    tensors: int = 0
    patch_weights: Mapping[int, torch.Tensor] = field(default_factory=dict)
    radius: int | None = None
    down_factor: int | None = None

    def conflicts(self, other: Feature) -> str | None:
        if isinstance(other, ClearFeature):
            return "CLEAR weights are on this MODEL already, and a second file would replace them. Remove one loader."
        return None

    def begin(self, run) -> list[str]:
        """Where the windows of this run are not what the weights were trained with, in words."""
        windows = [
            f.method for f in run.acting if isinstance(f, AttentionFeature) and isinstance(f.method, LocalWindow)
        ]
        if not windows:
            return ["no Local Window Attention is on this MODEL, for which these weights were trained"]
        notes = []
        for window in windows:
            pooled = window.down_factor if window.down_factor > 1 else 0
            if pooled and self.patch_weights and pooled != self.down_factor:
                raise ValueError(
                    f"These CLEAR weights pool patches of {self.down_factor} x {self.down_factor} tokens, but Local "
                    f"Window Attention has down_factor {pooled}. Set it to {self.down_factor}."
                )
            for name, mine, theirs in (
                ("radius", self.radius, window.radius),
                ("down_factor", self.down_factor, pooled),
                ("pooled_counts_as", "one" if self.patch_weights and window.counts_as == "all" else None, "all"),
            ):
                if mine is not None and mine != theirs:
                    notes.append(f"trained with {name} {mine}, Local Window Attention has {theirs}")
        for note in notes:
            log.warning("Load CLEAR Weights: %s.", note)
        return notes

    def facts(self, state: list[str]) -> dict[str, Any]:
        made = {"tensors": self.tensors, "radius": self.radius, "down_factor": self.down_factor}
        return made | {"notes": list(state or ())}

    def line(self, facts: dict[str, Any]) -> str:
        if not facts:
            return ""
        made = [f"{name} {facts[name]}" for name in ("radius", "down_factor") if facts[name] is not None]
        told = f"{facts['tensors']} tensors" + (f" for {', '.join(made)}" if made else "")
        return "; ".join([told, *facts["notes"]])


def load(model, path: str, node: str | None):
    """A clone of the MODEL with the weights of that file. ValueError, one sentence, where they do not fit."""
    diffusion_model = model.model.diffusion_model
    arch = archs.find(diffusion_model)
    if arch is None or arch.name != "Flux":
        kind = arch.name if arch else archs.class_name(diffusion_model)
        raise ValueError(f"CLEAR's weights are for FLUX.1, and this MODEL is {kind}. Load FLUX.1-dev.")
    sizes = len(diffusion_model.double_blocks), len(diffusion_model.single_blocks), diffusion_model.hidden_size
    tensors, metadata = read_weights(path, "download it again from Huage001/CLEAR")
    weights = read(tensors, *sizes, Path(path).name, metadata)
    patched = attach(
        model,
        ClearFeature(
            node,
            "Load CLEAR Weights",
            tensors=len(tensors),
            patch_weights=weights.patch_weights,
            radius=weights.radius,
            down_factor=weights.down_factor,
        ),
    )
    _replace(patched, weights)
    return patched


def _replace(patched, weights: ClearWeights) -> None:
    """Weight patches that set the projections, under whatever LoRA is on the MODEL: those add to the new weights."""
    diffusion_model = patched.model.diffusion_model
    config = {
        "depth": len(diffusion_model.double_blocks),
        "depth_single_blocks": len(diffusion_model.single_blocks),
        "hidden_size": diffusion_model.hidden_size,
    }
    names = comfy.utils.flux_to_diffusers(config, output_prefix="diffusion_model.")
    patches = {names[key]: ("set", (tensor,)) for key, tensor in weights.projections.items()}
    targets = {target if isinstance(target, str) else target[0] for target in patches}
    lost = targets - patched.model.state_dict().keys()
    if lost:
        raise ValueError(f"This FLUX has no {min(lost)}, which CLEAR's weights replace. Load FLUX.1-dev.")
    earlier = {key: patched.patches.pop(key, []) for key in targets}
    patched.add_patches(patches)
    for key, held in earlier.items():
        patched.patches[key] = patched.patches[key] + held
