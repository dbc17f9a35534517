"""Tiled Latents: each call of the diffusion model becomes one a tile, with the tile as its whole picture, so that places,
token grids, caches' histories and adapters are the tile's own."""

from dataclasses import dataclass
from itertools import product
from typing import Any

import comfy.model_management
import torch

from ..methods.control.tiles import Blend, spans
from .cache import EASYCACHE
from .control import ControlFeature
from .dynamic_grain import DynamicGrain
from .forward import Part, PartFeature
from .region import RegionFeature
from .run import Feature, Run

WHOLE = ("c_concat", "image_cond", "denoise_mask", "vace_context")  # conditions that have the latent's places
SCALED = (  # conditions of the whole picture at a scale of their own
    "effnet", "lq_latent", "camera_conditions", "pose_latents", "sam_latents", "keyframe_idxs",
)  # fmt: skip
NAMES = ("x", "t", "c_concat", "c_crossattn", "control", "transformer_options")  # arguments of apply_model


@dataclass
class Cut:
    """What one run did."""

    calls: int = 0
    tiles: int = 0  # most in one call
    sides: tuple[int, int] = (0, 0)


@dataclass(frozen=True, eq=False)
class TileFeature(PartFeature):
    """tile and overlap count places of the latent."""

    name: str = "Tiled Latents"
    tile: int = 64
    overlap: int = 24

    def begin(self, run: Run) -> Cut:
        return Cut()

    def conflicts(self, other: Feature) -> str | None:
        if isinstance(other, TileFeature):
            return "Tiled Latents is on this MODEL already. Remove one of the two."
        if isinstance(other, RegionFeature | DynamicGrain):
            return (
                f"{other.name} remembers the picture as a whole, and Tiled Latents shows the MODEL one tile after another. "
                "Use one of them."
            )
        if isinstance(other, ControlFeature) and not other.parts:
            return (
                f"{other.name} has a condition for the whole picture, and Tiled Latents shows the MODEL one tile after "
                "another. Use one of them."
            )
        return None

    def refuses(self, transformer_options: dict[str, Any]) -> str | None:
        if type(transformer_options.get(EASYCACHE)).__name__ == "EasyCacheHolder":
            return (
                "Tiled Latents shows the MODEL one tile after another, and core's EasyCache would give a tile what it kept of "
                "the one before. Remove one of them; LazyCache, Step Cache and Taylor Cache work beside it."
            )
        return None

    def shown(self, noise_shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(noise_shape) not in (4, 5):
            return noise_shape
        return (*noise_shape[:-2], *(min(side, self.tile) for side in noise_shape[-2:]))

    def in_parts(self, state: Cut, args: Any, kwargs: dict[str, Any], compute) -> torch.Tensor:
        given = dict(zip(NAMES, args, strict=False)) | kwargs
        x = given["x"]
        height, width = x.shape[-2:]
        sides = height, width
        spanned = (spans(side, self.tile, self.overlap) for side in sides)
        parts = [Part(rows, columns, sides) for rows, columns in product(*spanned)] if x.ndim in (4, 5) else []
        state.calls += 1
        state.tiles, state.sides = max(state.tiles, len(parts)), sides
        if len(parts) == 1:
            return compute(args, kwargs, None)
        self._check(given, x)
        blend = Blend()
        for part in parts:
            comfy.model_management.throw_exception_if_processing_interrupted()
            tile = given | {name: part.of(value) for name, value in given.items() if _cut(name, value, x)}
            made = compute([tile[name] for name in NAMES[: len(args)]], {name: tile[name] for name in kwargs}, part)
            blend.add(made, (part.rows, part.columns), sides)
        return blend.made(x.dtype)

    def _check(self, given: dict[str, Any], x: torch.Tensor) -> None:
        """ValueError for what belongs to the whole picture and cannot be cut."""
        if x.ndim not in (4, 5):
            raise ValueError(
                f"Tiled Latents cuts pictures [B, C, H, W] or clips [B, C, T, H, W], and this MODEL samples {[*x.shape]}. "
                "Remove it."
            )
        if given.get("control"):
            raise ValueError(
                f"A ControlNet sees the whole picture of {x.shape[-2]} x {x.shape[-1]} in latent space, and Tiled Latents "
                "shows the MODEL one tile after another. Remove one of them, or raise tile."
            )
        others = ((name, value) for name, value in given.items() if name not in ("x", *WHOLE))
        whole = [name for name, value in others if _like(value, x) or (name in SCALED and torch.is_tensor(value))]
        if whole:
            raise ValueError(
                f"Tiled Latents does not know how to cut the condition {whole[0]} {[*given[whole[0]].shape]} of the whole "
                "picture. Remove the node that made it, or raise tile."
            )

    def facts(self, state: Cut) -> dict[str, Any]:
        return {"calls": state.calls, "tiles": state.tiles, "sides": list(state.sides)}

    def line(self, facts: dict[str, Any]) -> str:
        if not facts or not facts["calls"]:
            return ""
        picture = "{} x {}".format(*facts["sides"])
        if facts["tiles"] == 1:
            return f"one tile covers the latent of {picture}"
        return f"{facts['tiles']} tiles in each of {facts['calls']} calls, latent of {picture}"


def _like(value: Any, x: torch.Tensor) -> bool:
    """Whether a condition has the sides of the latent."""
    return torch.is_tensor(value) and value.ndim >= 4 and value.shape[-2:] == x.shape[-2:]


def _cut(name: str, value: Any, x: torch.Tensor) -> bool:
    return name == "x" or (name in WHOLE and _like(value, x))
