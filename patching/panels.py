"""Panels of one picture on a MODEL: a post_input patch gives tokens the positions of methods/control/panels.py."""

from dataclasses import dataclass, field
from typing import Any

import comfy.sample
import comfy.utils
import torch

from ..methods.control.panels import Panels, canvas, stock
from .run import Feature, attach

NAME = "In-Context Panels"
SPATIAL, TEMPORAL = "downscale_ratio_spacial", "downscale_ratio_temporal"  # what core's empty latents carry


@dataclass
class Moved:
    """What one run did."""

    calls: int = 0
    size: tuple[int, int, int] | None = None  # tokens of a panel
    known: set[Any] = field(default_factory=set)  # canvases whose positions were found to be the stock ones


@dataclass(frozen=True, eq=False)
class PanelFeature(Feature):
    name: str = NAME
    layout: Panels = Panels((0,), (0,))

    def begin(self, run) -> Moved:
        return Moved()

    def conflicts(self, other: Feature) -> str | None:
        if isinstance(other, PanelFeature):
            return f"{NAME} is on this MODEL already, and both would move the same positions. Remove one of the two."
        return None

    def check_arch(self, arch, class_name: str) -> None:
        if arch is None or not arch.post_input:
            self.cannot(
                f"{NAME} moves positions that FLUX.1, FLUX.2 and their kin hand out, and "
                f"{arch.name if arch else class_name} does not. Load one of those."
            )

    def facts(self, state: Moved | None) -> dict[str, Any]:
        told = {"panels": self.layout.count, "axis": self.layout.axis, "clone": list(self.layout.clone)}
        made = state or Moved()
        return told | {
            "index": list(self.layout.index),
            "calls": made.calls,
            "tokens": made.size and list(made.size[1:]),
        }

    def line(self, facts: dict[str, Any]) -> str:
        if self.inactive or not facts:
            return self.inactive
        if not facts["calls"]:
            return "no call of this MODEL came by: nothing was moved"
        high, wide = facts["tokens"]
        places, index = (" ".join(map(str, facts[name])) for name in ("clone", "index"))
        return f"{facts['panels']} panels of {high} x {wide} tokens, at places {places}, index {index}"


class PanelPositions:
    """The patch. Inert outside our runs."""

    def __init__(self, feature: PanelFeature):
        self.feature = feature

    @torch.compiler.disable  # what it does depends on the run
    def __call__(self, given: dict[str, Any]) -> dict[str, Any]:
        from .forward import FORWARD

        forward = given["transformer_options"].get(FORWARD)
        if forward is None or self.feature not in forward.run.acting:
            return given
        ids, layout, state = given["img_ids"], self.feature.layout, forward.run.states[self.feature]
        grid = whole(forward)
        size = layout.size(grid)
        seen = (grid, tuple(ids.shape), str(forward.options.get("rope_options")))
        if seen not in state.known and not stock(ids, grid):
            raise ValueError(
                f"Another node moved the positions of this picture before {NAME} could. Put {NAME} before it, or "
                "remove it."
            )
        state.known.add(seen)
        state.calls, state.size = state.calls + 1, size
        forward.covered = layout.covered(grid)
        return {**given, "img_ids": layout.moved(ids, grid)}


def whole(forward) -> tuple[int, int, int]:
    """The token grid of this call. ValueError where it shows a part of the canvas only."""
    shapes, grid = forward.run.latent_shapes, forward.run.arch.grid(forward.diffusion_model, forward.x)
    if shapes and tuple(forward.x.shape[-2:]) != tuple(shapes[0][-2:]):
        raise ValueError(
            f"A condition covers {[*forward.x.shape[-2:]]} of the canvas of {[*shapes[0][-2:]]} latent cells (height, "
            f"width), and {NAME} cannot tell which panels those are. Use Conditioning (Set Mask) in place of an area."
        )
    return grid


def _samples(model, latent: dict[str, Any], what: str) -> torch.Tensor:
    """[B, C, h, w] as the sampler will have it."""
    samples = latent["samples"]
    if not getattr(samples, "is_nested", False):
        samples = comfy.sample.fix_empty_latent_channels(model, samples, latent.get(SPATIAL), latent.get(TEMPORAL))
    channels = model.get_model_object("latent_format").latent_channels
    if getattr(samples, "is_nested", False) or samples.ndim != 4 or samples.shape[1] != channels:
        shape = "several latents" if getattr(samples, "is_nested", False) else f"a latent {[*samples.shape]}"
        raise ValueError(
            f"{NAME} takes pictures of this MODEL, [batch, {channels}, height, width], and {what} is {shape}. Encode it "
            "with the VAE that belongs to the MODEL."
        )
    return samples


def build(model, latent: dict[str, Any], layout: Panels, clean=None, held: tuple[int, ...] = ()) -> dict[str, Any]:
    """The LATENT of the canvas: the given one in each panel, `clean` in those that are held by a noise mask."""
    panel = _samples(model, latent, "latent")
    if (clean is None) != (not held):
        raise ValueError(
            f"{NAME} was told to hold panels {[*held]} clean, and " + ("no LATENT clean is connected." if clean is None else
            "a LATENT clean is connected. Name its panels in clean_panels, like '0'.")
        )  # fmt: skip
    patch, (height, width) = model.model.diffusion_model.patch_size, panel.shape[-2:]
    side = width if layout.axis == "width" else height
    if side % patch:
        raise ValueError(
            f"{NAME} got a panel of {height} x {width} latent cells (height x width), and this MODEL joins {patch} into "
            f"a token: a token would lie in two panels. Make its {layout.axis} a multiple of {patch} cells, such as "
            f"{-(-side // patch) * patch}."
        )
    kept = None
    if clean is not None:
        kept = _samples(model, clean, "clean")
        if kept.shape[-2:] != panel.shape[-2:] or len(kept) not in (1, len(held)):
            raise ValueError(
                f"{NAME} holds {len(held)} panels of {height} x {width} latent cells, and clean has {len(kept)} of "
                f"{kept.shape[-2]} x {kept.shape[-1]}. Give one for all, or one for each in a batch, of that size."
            )
    mask = latent.get("noise_mask")
    if mask is not None:
        count = mask.numel() // (mask.shape[-1] * mask.shape[-2])
        mask = comfy.utils.reshape_mask(mask, (count, 1, height, width))
    samples, mask = canvas(panel, mask, layout, kept, held)
    rest = {key: value for key, value in latent.items() if key not in (SPATIAL, TEMPORAL, "noise_mask")}
    return rest | {"samples": samples} | ({} if mask is None else {"noise_mask": mask})


def panels(model, latent, layout: Panels, clean=None, held: tuple[int, ...] = (), node: str | None = None):
    """(MODEL, LATENT) with that many panels."""
    feature = PanelFeature(node, layout=layout)
    patched = attach(model, feature)
    patched.set_model_post_input_patch(PanelPositions(feature))
    return patched, build(model, latent, layout, clean, held)
