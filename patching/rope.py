"""Rotary positions of a MODEL: an object patch in place of its embedder, which ComfyUI takes off again. Stock where no
axis is to change; elsewhere only the channels of the axes that do."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import archs
from ..kernels.rope.tables import Axis, table
from .run import Feature, attach, current_forward

PLACES = ("time", "height", "width")
MISSED = "the positions of this MODEL were made elsewhere: nothing was changed"


class StretchedRope(torch.nn.Module):
    """Stands in for a stock EmbedND and asks a RopeFeature which axes to turn otherwise."""

    def __init__(self, found: torch.nn.Module, feature: "RopeFeature", text_after: bool):
        super().__init__()
        self.dim, self.theta, self.axes_dim = found.dim, found.theta, found.axes_dim
        self.held = (found,)  # not a submodule: the model's modules stay as they are
        self.feature, self.text_after = feature, text_after

    @torch.compiler.disable  # what it does depends on the run
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Positions [B, N, A] -> [B, 1, N, P, 2, 2]."""
        stock = self.held[0](ids)
        forward = current_forward.get()
        mine = forward is not None and self.feature in forward.run.acting and forward.grid is not None
        lengths = lengths_of(forward) if mine else extents(ids)
        axes = self.feature.axes(lengths, columns(ids.shape[-1]), self.axes_dim, self.theta)
        if mine:
            forward.run.states[self.feature].append(lengths)
        if not axes:
            return stock
        start = max(forward.grid[1] // 2, forward.grid[2] // 2) if mine and self.text_after else None
        parts = list(stock.split([dim // 2 for dim in self.axes_dim[: ids.shape[-1]]], -3))
        for column, axis in axes.items():
            parts[column] = turned(ids, column, axis, start)[:, None].to(parts[column].dtype)
        return torch.cat(parts, -3)


def turned(ids: torch.Tensor, column: int, axis: Axis, start: int | None) -> torch.Tensor:
    """Rotations [B, N, dim / 2, 2, 2] of one column of ids [B, N, A]. start: where text begins that has one position on
    all axes. It keeps its place at the picture's edge, as far as the picture is stretched, and its own stock spacing."""
    at = ids[..., column, None]
    out = table(at, [axis])
    if start is None:
        return out
    text = (ids == ids[..., :1]).all(-1) & (ids[..., 0] >= start)
    edge, spaced = table(torch.full_like(at, start), [axis]), table(at - start, [Axis(axis.dim, axis.theta)])
    return torch.where(text[..., None, None, None], edge @ spaced, out)


def columns(count: int) -> tuple[int | None, int, int]:
    """Where positions of that many columns hold (t, h, w): two of them are (h, w)."""
    return (None, 0, 1) if count == 2 else (0, 1, 2)


def lengths_of(forward) -> tuple[float, float, float]:
    """What the picture of this call covers along (t, h, w), in positions: its tokens, or what a feature that
    moved them left to cover, as far as core's ScaleROPE node moves them apart."""
    scales = (forward.options.get("rope_options") or {}) if forward.run.arch.rope_options else {}
    tokens = forward.covered or forward.grid
    t, h, w = ((n - 1) * scales.get(f"scale_{axis}", 1.0) + 1 for n, axis in zip(tokens, "tyx", strict=True))
    return t, h, w


def extents(ids: torch.Tensor) -> tuple[float, float, float]:
    """The same outside of a sampling run, from what the positions cover; tokens with one position on all axes, which
    text has, are left out."""
    placed = ids.flatten(0, -2).float()
    placed = placed[(placed != placed[:, :1]).any(-1)]
    if not len(placed):
        return 1.0, 1.0, 1.0
    spans = (placed.amax(0) - placed.amin(0) + 1).tolist()
    t, h, w = (1.0 if c is None else spans[c] for c in columns(ids.shape[-1]))
    return t, h, w


@dataclass(frozen=True, eq=False)
class RopeFeature(Feature):
    """Which axes turn otherwise."""

    def axes(
        self,
        lengths: tuple[float, float, float],
        places: tuple[int | None, int, int],
        dims: list[int],
        theta: float,
    ) -> dict[int, Axis]:
        """lengths of the picture along (t, h, w), the columns of those, channels of each column -> the columns that
        change."""
        raise NotImplementedError

    def begin(self, run) -> list[tuple[float, float, float]]:
        return []

    def conflicts(self, other: Feature) -> str | None:
        if isinstance(other, RopeFeature):
            return f"{other.name} sets the positions of this MODEL already, and {self.name} would undo that. Use one of them."
        return None

    def check_arch(self, arch, class_name: str) -> None:
        if arch is None or not arch.rope:
            self.cannot(f"{self.name} does not know how {arch.name if arch else class_name} embeds positions.")


@dataclass(frozen=True, eq=False)
class Stretch(RopeFeature):
    """Axes longer than their window are stretched, as kernels/rope/tables.py has it; `options` go to Axis."""

    windows: tuple[int, int, int] = (21, 64, 64)  # trained tokens along (t, h, w)
    time: bool = False  # whether the axis of time may change too
    method: str = "yarn"
    options: Mapping[str, Any] | None = None

    def axes(self, lengths, places, dims, theta):
        found = {}
        for place, column in enumerate(places):
            if column is None or (place == 0 and not self.time) or lengths[place] <= self.windows[place]:
                continue
            size = {"window": self.windows[place], "span": lengths[place]}
            found[column] = Axis(dims[column], float(theta), self.method, **size, **(self.options or {}))
        return {} if self.method == "base" else found

    def facts(self, state) -> dict[str, Any]:
        last = [round(n, 3) for n in state[-1]] if state else None
        return {"calls": len(state or ()), "tokens": last, "window": list(self.windows)}

    def line(self, facts: dict[str, Any]) -> str:
        if self.inactive or not facts:
            return self.inactive
        if not facts["calls"]:
            return MISSED
        pairs = zip(PLACES, facts["tokens"], facts["window"], strict=True)
        long = [
            f"{name} {n:g} of {trained}" for name, n, trained in pairs if n > trained and (name != "time" or self.time)
        ]
        if self.method == "base" or not long:
            return "within the trained size: unchanged" if self.method != "base" else "base: unchanged"
        return f"stretched: {', '.join(long)} tokens"


@dataclass(frozen=True, eq=False)
class Theta(RopeFeature):
    """All axes with theta times a factor, whatever their length: CLEAR's NTK factor."""

    factor: float = 1.0

    def axes(self, lengths, places, dims, theta):
        return {column: Axis(dim, float(theta) * self.factor) for column, dim in enumerate(dims)}

    def facts(self, state) -> dict[str, Any]:
        return {"calls": len(state or ()), "factor": self.factor}

    def line(self, facts: dict[str, Any]) -> str:
        if self.inactive or not facts:
            return self.inactive
        return f"theta x {self.factor:g}" if facts["calls"] else MISSED


def embed(model, feature: RopeFeature):
    """A clone of the MODEL with this feature in place of its embedder. ValueError where another node replaced that."""
    patched = attach(model, feature)
    acting = patched.model_options["transformer_options"]["tessera_features"][-1]
    if acting.inactive:
        return patched
    arch = archs.find(patched.model.diffusion_model)
    path = f"diffusion_model.{arch.rope}"
    found = patched.get_model_object(path)
    if (type(found).__module__, type(found).__name__) != ("comfy.ldm.flux.layers", "EmbedND"):
        raise ValueError(
            f"Another node put its {type(found).__name__} in place of this MODEL's {arch.rope}, and {feature.name} would "
            "undo that. Use one of them."
        )
    patched.add_object_patch(path, StretchedRope(found, acting, arch.text_after))
    return patched
