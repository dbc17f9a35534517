"""The settings at which attention_quality.py measures each training-free attention node."""

from dataclasses import dataclass, field
from typing import Any

DEFAULT = "default"
SCALED = "default, scaled to this size"  # the default spans such a small picture: the same part of a large one


@dataclass(frozen=True)
class Setting:
    """Inputs of a node that are not its defaults, min_tokens 0 beside them. main: its default setting, as far as this size has one."""

    node: str
    title: str
    inputs: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def main(self) -> bool:
        return self.note != ""


def _settings(name: str, main: dict[str, Any], note: str, *others: dict[str, Any]) -> list[Setting]:
    node = "Tessera" + "".join(word if word == "3D" else word.capitalize() for word in name.replace("-", " ").split())
    return [Setting(node.replace("3D", "3d"), name, inputs, note * (inputs is main)) for inputs in (main, *others)]


_ALL_WINDOWED = {"global_every": 0, "shift": "alternate"}
_EARLY = {"dense_first_steps": 2}

SETTINGS: dict[str, list[Setting]] = {
    "video": [
        *_settings("Sparse-Linear Attention", {}, DEFAULT, {"topk": 0.25}),
        *_settings("Log-Linear Sparse Attention", {}, DEFAULT, {"density": 0.125}, {"density": 0.5}),
        *_settings("Local Window Attention", {}, DEFAULT, {"temporal_radius": 1}, {"temporal_radius": 0}, {"down_factor": 0}),
        *_settings("Attention Tile", {}, DEFAULT, {"ref_frames": 1}, {"ref_frames": 2}),
        *_settings("Window Attention 3D", {"wt": 4, "wh": 2, "ww": 2}, SCALED, {"wt": 4}, {"wt": 4, **_ALL_WINDOWED},
                   {"wt": 8, "wh": 2, "ww": 2}),
        *_settings("Diagonal Attention", {}, DEFAULT, {"depth": 1.0}, {"block": 32, "order": "tile3d"},
                   {"block": 32, "order": "tile3d", "depth": 1.0}),
        *_settings("Rettention", {}, DEFAULT, _EARLY, {**_EARLY, "density": 0.25}),
    ],
    "image": [
        *_settings("Sparse-Linear Attention", {}, DEFAULT, {"topk": 0.25}, {"topk": 0.75}),
        *_settings("Log-Linear Sparse Attention", {}, DEFAULT, {"density": 0.0625}, {"density": 0.125}, {"density": 0.5}),
        *_settings("Local Window Attention", {"radius": 4}, SCALED, {"radius": 2}, {"radius": 6}, {"radius": 4, "down_factor": 0}),
        *_settings("Window Attention 3D", {"wh": 4, "ww": 4}, SCALED, {"wh": 8, "ww": 8}, {"wh": 4, "ww": 4, **_ALL_WINDOWED}),
        *_settings("Diagonal Attention", {"block": 16}, SCALED, {"block": 64}, {"block": 16, "depth": 1.0}, {"block": 64, "depth": 1.0}),
        *_settings("Rettention", {}, DEFAULT, _EARLY, {**_EARLY, "density": 0.25}),
    ],
}  # fmt: skip
