"""Whether a ControlNet acts on a model call as it did before: a forecast from outputs under another control is wrong."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

CHANGE = 0.35  # relative; residuals drift from step to step, a ControlNet that ends, fades or starts jumps
MARKS = 64  # numbers of a residual that are compared


@dataclass(frozen=True)
class Control:
    """Residuals that are there, by list and place, and some numbers of the first and the last of each list."""

    places: tuple[tuple[str, int], ...]
    marks: tuple[tuple[float, ...], ...]

    def like(self, other: "Control") -> bool:
        """Whether a forecast may go on from one to the other."""
        if self.places != other.places:
            return False
        return all(math.dist(a, b) <= CHANGE * max(math.hypot(*a), math.hypot(*b)) for a, b in self._pairs(other))

    def _pairs(self, other: "Control"):
        return zip(self.marks, other.marks, strict=True)


def control_of(residuals: Mapping[str, Any] | None) -> Control:
    """What a model call is given as `control`: lists of tensors or None by name."""
    if not residuals:
        return Control((), ())
    lists = {name: found for name, found in residuals.items() if isinstance(found, (list, tuple))}
    places = tuple((name, i) for name, found in lists.items() for i, x in enumerate(found) if x is not None)
    marks = []
    for found in lists.values():
        tensors = [x for x in found if isinstance(x, torch.Tensor) and x.numel()]
        marks += [_marks(x) for x in tensors[:1] + tensors[1:][-1:]]
    return Control(places, tuple(marks))


def _marks(x: torch.Tensor) -> tuple[float, ...]:
    """Numbers of the first row of a batch, evenly spread: joined and separate calls give the same."""
    flat = x.detach()[0].reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, min(MARKS, flat.numel())).round().long()
    return tuple(flat[places.to(flat.device)].float().tolist())
