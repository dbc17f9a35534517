"""EasyCache (arXiv 2507.02860): the model's output changes with its input at a rate k that changes slowly.

At computed evaluations k = mean |o - o'| / mean |x - x'| against the computed one before. At every evaluation the output
is expected to have moved by k mean |dx| / mean |o'|, dx since the evaluation before; while the sum of that stays below
the threshold, o = x + (o' - x') stands in for the output.
"""

import torch

from .gate import Gate, Seen


def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """mean |a - b|, scalar in at least fp32."""
    return (_exact(a) - _exact(b)).abs().mean()


def _exact(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


class EasyCache(Gate):
    def __init__(self, threshold: float):
        self.threshold = threshold
        self._sum = 0.0
        self._x: torch.Tensor | None = None  # input of the evaluation before
        self._computed_x: torch.Tensor | None = None
        self._output: torch.Tensor | None = None
        self._size: torch.Tensor | None = None  # mean |output|
        self._rate: torch.Tensor | None = None  # k, on the device: one read a step is enough

    def computes(self, seen: Seen, forced: bool) -> bool:
        assert seen.now is not None
        last, self._x = self._x, seen.now.detach().clone()
        if self._rate is None or self._size is None or last is None or last.shape != self._x.shape:
            return True
        self.error = float(self._rate * distance(self._x, last) / self._size)
        self._sum += self.error
        if forced or not self._sum < self.threshold:
            self._sum = 0.0
            return True
        return False

    def computed(self, seen: Seen, made: torch.Tensor) -> None:
        assert self._x is not None
        output = made.detach().clone()
        if self._output is not None and self._computed_x is not None and self._output.shape == output.shape:
            moved = distance(self._x, self._computed_x)
            same = moved == 0  # heun: two evaluations of one input say nothing about the rate
            rate = distance(output, self._output) / moved.where(~same, torch.ones_like(moved))
            self._rate = rate if self._rate is None else self._rate.where(same, rate)
        self._output, self._computed_x, self._size = output, self._x, _exact(output).abs().mean()
