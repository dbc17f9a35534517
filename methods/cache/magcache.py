"""MagCache (arXiv 2506.09045): how the magnitude of the stack's residual changes from step to step hardly depends on the
prompt, so ratios recorded once say how wrong a reused residual is.

gamma_i = mean over tokens of |r_i| / |r_{i-1}|. While steps are skipped, R is the product of their gammas and the error
is the sum of |1 - R|; a step is skipped while that sum is below the threshold and no more than K are in a row.
"""

from collections.abc import Sequence

from .gate import Gate, Seen


def ratios_for(ratios: Sequence[float], recorded: Sequence[float], sigmas: Sequence[float]) -> list[float]:
    """One ratio for each step of a run that starts its steps at `sigmas`.

    recorded: where the steps of the recording started; the nearest one counts. Without one sigma a ratio, steps are
    matched by their place in the run."""
    if not ratios or not sigmas:
        raise ValueError("MagCache needs at least one recorded ratio and one step.")
    if len(recorded) >= len(ratios):
        places = [min(range(len(ratios)), key=lambda i: abs(recorded[i] - s)) for s in sigmas]
    else:
        way = (len(ratios) - 1) / max(len(sigmas) - 1, 1)
        places = [round(i * way) for i in range(len(sigmas))]
    return [float(ratios[place]) for place in places]


class MagCache(Gate):
    """ratios: one a step of the run. most: K, the steps that may be skipped in a row, -1 for any number.
    retention: part of the run's steps at its start that is always computed."""

    def __init__(self, threshold: float, ratios: Sequence[float], most: int = -1, retention: float = 0.0):
        self.threshold, self.ratios, self.most = threshold, list(ratios), most
        self._first = int(len(self.ratios) * retention)
        self._step = -1
        self._clear()

    def _clear(self) -> None:
        self._product, self._sum, self._skipped = 1.0, 0.0, 0

    def computes(self, seen: Seen, forced: bool) -> bool:
        if seen.step != self._step:  # a second evaluation of a step continues from the same place of the curve
            self._product *= self.ratios[min(seen.step, len(self.ratios) - 1)]
        self._step = seen.step
        self._skipped += 1
        self.error = abs(1.0 - self._product)
        self._sum += self.error
        over = self._sum >= self.threshold or 0 <= self.most < self._skipped
        if forced or over or seen.step < self._first:
            self._clear()
            return True
        return False
