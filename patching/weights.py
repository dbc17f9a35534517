"""Weights as their file has them."""

from typing import Any

import torch


def plain_weight(model: Any, key: str) -> torch.Tensor:
    """The weight or buffer of that name without the LoRA that a run of this MODEL, or of one that shares its modules, has
    put into it: then ComfyUI holds the original beside it. AttributeError where there is none."""
    if (before := unpatched(model, key)) is not None:
        return before
    owner, _, leaf = key.rpartition(".")
    module = model.model.get_submodule(owner)
    return getattr(module, leaf)


def unpatched(model: Any, key: str) -> torch.Tensor | None:
    """What ComfyUI holds of a weight while a LoRA of any clone is in its place."""
    if key in model.hook_backup:
        return model.hook_backup[key][0]
    return model.backup[key].weight if key in model.backup else None
