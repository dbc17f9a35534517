"""TeaCache (arXiv 2411.19108, section 3.3): the modulated input of the first block tells how far the output has moved.

d_i is the relative L1 change of that input since the evaluation before, a polynomial fitted per model turns it into the
change of the output, and |p(d_i)| is summed since the last computed evaluation; below the threshold, nothing is computed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...kernels.cache.relative_l1 import relative_l1
from .gate import Gate, Seen


def polynomial(coefficients: Sequence[float], x: float) -> float:
    """Horner's scheme, the highest power first."""
    total = 0.0
    for coefficient in coefficients:
        total = total * x + coefficient
    return total


def parsed(text: str) -> tuple[float, ...]:
    """Numbers separated by commas or spaces, brackets allowed. ValueError where they are none."""
    try:
        found = tuple(float(part) for part in text.strip(" \n[]()").replace(",", " ").split())
    except ValueError:
        found = ()
    if not found or not all(map(math.isfinite, found)):
        raise ValueError(
            f"coefficients must be auto or a list of finite numbers with the highest power first, got {text!r}, for example "
            "498.65, -283.78, 55.86, -3.82, 0.264."
        )
    return found


class TeaCache(Gate):
    """find: makes (whose polynomial it is, its coefficients) at the first evaluation, when the picture's size is known."""

    def __init__(self, threshold: float, find: Callable[[], tuple[str, tuple[float, ...]]]):
        self.threshold, self._find = threshold, find
        self.source = ""
        self.coefficients: tuple[float, ...] = ()
        self._sum = 0.0
        self._last: torch.Tensor | None = None

    def computes(self, seen: Seen, forced: bool) -> bool:
        if not self.coefficients:
            self.source, self.coefficients = self._find()
        now, last = seen.modulated(), self._last
        if now is None:
            raise ValueError("TeaCache found no modulated input in this model's first block. Choose another policy.")
        self._last = now.detach().clone()
        if last is None or last.shape != now.shape or last.dtype != now.dtype:
            self._sum = 0.0
            return True
        self.error = abs(polynomial(self.coefficients, float(relative_l1(now, last))))
        self._sum += self.error
        if forced or not self._sum < self.threshold:
            self._sum = 0.0
            return True
        return False

    @property
    def facts(self) -> dict[str, Any]:
        return {"coefficients": self.source}
