"""DiT families: token layout and block list, one file each. Nothing else in the pack knows a model by name."""

import importlib
import math
import pkgutil
from collections.abc import Mapping
from typing import Any

import torch

from ._layout import Arch, Blocks, Grid, Kind, Layout, Modules, Place, unpadded

__all__ = [
    "Arch", "Blocks", "Grid", "Kind", "Layout", "Modules", "Place", "all_archs", "block_modules", "find", "layout_of", "obscured",
]  # fmt: skip

_found: dict[tuple[str, str], Arch] = {}


def all_archs() -> dict[tuple[str, str], Arch]:
    """(home package, class name) of the diffusion model -> Arch, from every file of this folder."""
    if not _found:
        for info in pkgutil.iter_modules(__path__):
            if not info.name.startswith("_"):
                for arch in importlib.import_module(f"{__name__}.{info.name}").ARCHS:
                    _found.update({(arch.home, name): arch for name in arch.classes})
    return _found


def original(module: Any) -> Any:
    """The module that torch.compile wrapped, where another pack put the wrapper in its place; else the module."""
    return getattr(module, "_orig_mod", module)


def class_name(diffusion_model: Any) -> str:
    """What a message calls a model, known or not."""
    return type(original(diffusion_model)).__name__


def find(diffusion_model: Any) -> Arch | None:
    """The family of this model, by its exact class; None for a model we do not know (a subclass, or another package's
    class of the same name, counts as unknown: it may lay its tokens out differently). A model of diffusers names its
    class there as `bridged`, a network of our own as `network`."""
    kind = type(original(diffusion_model))
    if (ours := kind.__dict__.get("network")) is not None:
        return all_archs().get(("networks", ours))
    if (bridged := getattr(kind, "bridged", None)) is not None:
        return all_archs().get(("diffusers", bridged.__name__))
    if not kind.__module__.startswith("comfy.ldm."):
        return None
    parts = kind.__module__.split(".")[2:]
    homes = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
    return next((arch for home in homes if (arch := all_archs().get((home, kind.__name__)))), None)


def obscured(arch: Arch, arguments: Mapping[str, Any]) -> str | None:
    """The first of the model's arguments that makes its token layout unknown, or None. Layouts of such a call must
    not be used, even where the lengths happen to fit."""
    return next((name for name in arch.opaque if arguments.get(name) is not None), None)


def layout_of(
    arch: Arch, grid: Grid, kind: Kind, queries: int, keys: int, references: int = 0, pad: int | None = None
) -> Layout | None:
    """Layout of one attention call with that many query and key tokens, or None where it is not image
    self-attention of a known shape. `references` counts reference-image tokens that follow the image, `pad` is
    `arch.pad(diffusion_model)`: without it the layout of a family that pads is unknown."""
    if kind not in ("self", "joint") or queries != keys or (pad is None and arch.pad is not unpadded):
        return None
    tokens, pad = math.prod(grid), pad or 1
    others = queries - -(-tokens // pad) * pad - references
    alone = kind == "self" or arch.place == "none"
    if others < 0 or others % pad or (alone and others):
        return None
    start = others if arch.place == "prefix" and not alone else 0
    return Layout(grid, slice(start, start + tokens), queries)


def block_modules(diffusion_model: Any, blocks: Blocks) -> list[tuple[str, torch.nn.Module]]:
    """(dotted path below the diffusion model, module) of each block, in running order; of a compiled one that inside."""
    owner = diffusion_model
    for part in blocks.path.split("."):
        owner = getattr(owner, part)
    return [(f"{blocks.path}.{key}", original(block)) for key, block in owner.named_children()]
