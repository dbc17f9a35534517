"""Forwards of modules that object patches exchange, also where torch.compile or another pack has put a module of its own in
the place of theirs. ComfyUI puts patches back in the order in which it applied them: of two on one module, "x" and
"x.forward", one would stay on the network that all clones share. So a module that is a patch itself carries ours."""

import copy
from collections.abc import Callable
from typing import Any

import comfy.utils

from .. import archs


class StandIn:
    """In the place of a forward."""

    original: Any

    def around(self, forward: Any) -> Any:
        """The same in the place of another forward of this module, as torch.compile makes it."""
        made = copy.copy(self)
        made.original = forward
        return made


def standing(patcher: Any, path: str) -> Any:
    """What stands at this path below the BaseModel once the MODEL is loaded, whatever clone is loaded now."""
    found, at, patched = patcher.model, "", False
    for part in path.split("."):
        at = f"{at}.{part}" if at else part
        own = patcher.object_patches.get(at)
        if own is None and not (patched and part == "forward"):  # the network's own; that module's is another
            before = patcher.object_patches_backup.get(at)
            found = getattr(found, part) if before is None else before
        else:
            found = getattr(found, part) if own is None else own
        patched = own is not None
    return found


def cleared(patcher: Any) -> Any:
    """Gives the network its own parts back, the newest first -> the BaseModel. ComfyUI puts a clone's on again whenever
    it is loaded, also where it was the last."""
    held = patcher.object_patches_backup
    for path in reversed([*held]):
        comfy.utils.set_attr(patcher.model, path, held.pop(path))
    return patcher.model


def exchange(patched: Any, path: str, make: Callable[[Any, Any], Any]) -> None:
    """Puts make(forward, written) in the place of the forward of the module at this path. written: the same as its class
    has it, where forward is that of a compiled module."""
    forward, module = standing(patched, f"{path}.forward"), patched.object_patches.get(path)
    if module is None:
        patched.add_object_patch(f"{path}.forward", make(forward, forward))
        return
    inner = archs.original(module)
    shared = patched.object_patches_backup.get(f"{path}.forward")
    written = forward if inner is module else shared or inner.forward
    patched.add_object_patch(path, carrying(module, make(forward, written)))


def carrying(module: Any, forward: Any) -> Any:
    """A copy of a module, with this forward."""
    made = copy.copy(module)
    made.forward = forward
    return made


def untangle(patcher: Any) -> None:
    """For a MODEL that is not loaded yet: modules that another node exchanged after ours."""
    patches = patcher.object_patches
    for path in [path.removesuffix(".forward") for path in patches if path.endswith(".forward")]:
        if path in patches and isinstance(patches[f"{path}.forward"], StandIn):
            ours = patches.pop(f"{path}.forward")
            patches[path] = carrying(patches[path], ours.around(patches[path].forward))
