"""What core's ModelPatcher does with a weight's tensor itself, done for packed weights: LoRA that are switched on and off
while sampling (hooks), and the list of weights that merges and hooks start from.

Core writes the patched weight into the old one's memory, which a packed weight with a new branch has no room for; here
the layer gets the other tensor. Kept for the next switch is the packed weight with its branch, not a dense one.
"""

import contextlib
import functools
from typing import Any

import comfy.utils
import torch

from .quant_branched import BranchedLinear, saving
from .quant_ops import PackedLinear


class PackedPatcher:
    """Goes before ModelPatcher in the order of bases."""

    model: Any
    hook_backup: dict[str, Any]
    cached_hook_patches: dict[Any, dict[str, Any]]
    _parts = True  # whether the state dict names the parts of packed weights
    _whole = True  # whether it holds what LoRA add, where that takes a moment

    def _packed(self, key: str) -> PackedLinear | BranchedLinear | None:
        """The layer whose weight this is, where that is one of ours."""
        module, _, name = key.rpartition(".")
        owner = comfy.utils.get_attr(self.model, module) if name == "weight" else None
        mine = (isinstance(owner, PackedLinear) and owner.is_ours()) or isinstance(owner, BranchedLinear)
        return owner if mine else None

    def clone(self, *args, **kwargs):
        return patched(super().clone(*args, **kwargs))  # type: ignore[misc]

    def model_state_dict(self, filter_prefix=None):
        with while_saving(self._whole):
            found = super().model_state_dict(filter_prefix)  # type: ignore[misc]
        return found if self._parts else {key: found[key] for key in found if self._exists(key)}

    def model_state_dict_for_saving(self, *args, **kwargs):
        with while_saving(True):
            return super().model_state_dict_for_saving(*args, **kwargs)  # type: ignore[misc]

    def add_patches(self, *args, **kwargs):
        return self._for_keys(super().add_patches, *args, **kwargs)  # type: ignore[misc]

    def patch_hooks(self, *args, **kwargs):
        return self._for_keys(super().patch_hooks, *args, **kwargs)  # type: ignore[misc]

    def _for_keys(self, call, *args, **kwargs):
        """What asks core for the whole state dict only to know its keys."""
        self._whole = False
        try:
            return call(*args, **kwargs)
        finally:
            self._whole = True

    def _exists(self, key: str) -> bool:
        module, _, name = key.rpartition(".")
        return hasattr(self.model.get_submodule(module), name)

    def get_key_patches(self, filter_prefix=None):
        self._parts = False
        try:
            return super().get_key_patches(filter_prefix)  # type: ignore[misc]
        finally:
            self._parts = True

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights, memory_counter):
        super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)  # type: ignore[misc]
        owner = self._packed(key)
        if owner is not None and key in self.cached_hook_patches.get(hooks, {}):
            self.cached_hook_patches[hooks][key] = owner.weight, owner.weight.device

    def patch_cached_hook_weights(self, cached_weights, key, memory_counter):
        owner = self._packed(key)
        if owner is None:
            super().patch_cached_hook_weights(cached_weights, key, memory_counter)  # type: ignore[misc]
            return
        self.hook_backup.setdefault(key, (owner.weight, owner.weight.device))
        owner.weight = _parameter(*cached_weights[key])

    def unpatch_hooks(self, whitelist_keys_set=None):
        for key in [*self.hook_backup]:
            if (not whitelist_keys_set or key in whitelist_keys_set) and (owner := self._packed(key)) is not None:
                owner.weight = _parameter(*self.hook_backup.pop(key))
        super().unpatch_hooks(whitelist_keys_set)  # type: ignore[misc]


@contextlib.contextmanager
def while_saving(whole: bool):
    token = saving.set(whole)
    try:
        yield
    finally:
        saving.reset(token)


def _parameter(weight: torch.Tensor, device: torch.device) -> torch.nn.Parameter:
    return torch.nn.Parameter(weight.to(device), requires_grad=False)


@functools.cache
def _class(base: type) -> type:
    return type(base.__name__, (PackedPatcher, base), {})


def patched(model: Any) -> Any:
    """The same ModelPatcher, of a class that knows packed weights."""
    if not isinstance(model, PackedPatcher):
        model.__class__ = _class(type(model))
    return model
