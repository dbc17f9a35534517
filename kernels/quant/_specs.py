"""Specs for bench/aot.py whose tiles, warps and stages are those of kernels/configs."""

from collections.abc import Callable
from typing import Any

from .. import _config

Spec = dict[str, Any]


def configured(
    spec: Spec, operation: str, bits: int, width: int, constants: Callable[[list[int]], dict[str, Any]]
) -> Spec:
    """The spec with what each GPU's table gives; constants: tile -> the kernel's constexpr arguments."""

    def own(name: str) -> Spec:
        tuned = _config.entry(operation, name, bits, width)
        return {"warps": tuned["warps"], "stages": tuned["stages"], "const": constants(tuned["tile"])}

    return spec | own("default") | {"per_target": {name: own(name) for name in _config.tables()}}
