"""Compiles into Triton's disk cache for a GPU without touching it, through the launchers themselves: a process that
samples later finds every kernel ready instead of stalling in its first step.

`python -m` cannot be used, since the pack's folder may have any name: patching/prewarm.py loads it in a child."""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import _config
from ._triton import _rehearsing, triton


class _Driver:
    """Stands for the GPU: Triton asks it for the target and nothing else while it only compiles."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def launchers() -> list[tuple[Any, Callable, Callable]]:
    """(op, launch, reference) of every kernel module."""
    folder = Path(__file__).parent
    found = []
    for info in pkgutil.walk_packages([str(folder)], f"{__package__}."):
        module = importlib.import_module(info.name)
        op = getattr(module, info.name.rsplit(".", 1)[1], None)
        if hasattr(module, "launch") and hasattr(module, "reference") and hasattr(op, "register_kernel"):
            found.append((op, module.launch, module.reference))
    return found


def compile_for(target: tuple[str, int | str, int], table: str, work: Callable[[], Any]) -> list[str]:
    """Runs `work` on CPU tensors with every op compiled for `target` (backend, architecture, threads of a warp) and its
    configuration `table`, and answered by its reference. -> names of the kernels that were compiled or found in the
    cache. Changes this process for good: for a child only."""
    if not hasattr(triton, "__version__"):
        raise RuntimeError("Triton is not installed: there is nothing to compile.")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(_Driver(GPUTarget(*target)))
    _rehearsing.append(True)
    compiled: list[str] = []
    run = JITFunction.run

    def only_compile(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(self.fn.__name__)
        return kernel

    setattr(JITFunction, "run", only_compile)  # noqa: B010  mypy: a method may not be assigned
    setattr(_config, "architecture", lambda device: table)  # noqa: B010
    for op, launch, reference in launchers():

        def both(*args, _launch=launch, _reference=reference, **kwargs):
            _launch(*args, **kwargs)
            return _reference(*args, **kwargs)

        op.register_kernel("cpu")(both)
    work()
    return compiled
