"""When to forecast: the confidence gate of arXiv 2508.02240 ("Forecasting When to Forecast").

The first block is computed at every evaluation, and a second history forecasts its output B as the last block's is
forecast. Where the forecast of B is good, e = mean |B^ - B| / mean |B| < threshold, the forecast of the last block is
trusted. B's history advances at computed evaluations only, so that its error mirrors the last block's.

Where no block can be reached, `Predicted` judges by EasyCache's measure instead: how much the output is expected to have
changed since the newest computed evaluation, from how much the input has.
"""

import torch

from ...kernels.cache.gated_error import gated_error
from .gate import Gate, Seen
from .taylor import Forecast

METRICS = ("rel_l1", "rel_l2", "cosine")
OVER = ("first_stream", "all_rows", "max")


class Confidence(Gate):
    """threshold: computes where the first block's forecast is off by this or more.
    history:    empty, of the first block's output.
    metric:     "rel_l1"; "rel_l2" |B^ - B| / |B|; "cosine" 1 - cos(B^, B).
    over:       "first_stream": one error over the batch of the first prompt. "all_rows": over every prompt of the first
                call, which are all of them in joined CFG and one in separate CFG. "max": the first prompt's worst sample.
    every_step: the history also takes evaluations that are not computed.
    """

    def __init__(
        self,
        threshold: float,
        history: Forecast,
        metric: str = "rel_l1",
        over: str = "first_stream",
        every_step: bool = False,
    ):
        if metric not in METRICS or over not in OVER:
            raise ValueError(f"A confidence gate has metric {', '.join(METRICS)} and gate_on {', '.join(OVER)}.")
        self.threshold, self.history, self.metric, self.over = threshold, history, metric, over
        self.every_step = every_step

    def computes(self, seen: Seen, forced: bool) -> bool:
        now = seen.every if self.over == "all_rows" and seen.every is not None else seen.now
        assert now is not None  # every level shows it
        now = now.movedim(seen.axis, 0) if seen.axis >= 0 else now[None]
        self.error = self._error(now, seen.x) if self.history.serves(seen.x, now) else None
        full = forced or self.error is None or not self.error < self.threshold  # NaN computes
        if full or self.every_step:
            self.history.update(now, seen.x)
        return full

    def _error(self, now: torch.Tensor, x: float) -> float:
        """now [b, ...] -> the error of its forecast; one read from the device."""
        sums = _SUMS[self.metric](self.history, now, x)
        if self.over != "max":
            sums = sums.sum(0, keepdim=True)
        return max(map(_RATIO[self.metric], sums.tolist()), key=_worst)

    @property
    def bytes_held(self) -> int:
        return self.history.bytes_held


def _l1(history: Forecast, now: torch.Tensor, x: float) -> torch.Tensor:
    features, weights = history.terms(x)
    return gated_error(features, weights, now.detach().to(features[0].device))


def _products(history: Forecast, now: torch.Tensor, x: float) -> torch.Tensor:
    """[b, 3]: <B^, B>, <B^, B^> and <B, B>."""
    guess, b = (t.detach().flatten(1).float() for t in (history.predict(x), now))
    return torch.stack(((guess * b).sum(1), guess.square().sum(1), b.square().sum(1)), 1)


def _squares(history: Forecast, now: torch.Tensor, x: float) -> torch.Tensor:
    """[b, 2]: |B^ - B|^2 and |B|^2."""
    guess, b = (t.detach().flatten(1).float() for t in (history.predict(x), now))
    return torch.stack(((guess - b).square().sum(1), b.square().sum(1)), 1)


def _ratio(change: float, size: float) -> float:
    return 0.0 if change == 0 else change / size if size else float("inf")


def _cosine(both: float, guess: float, size: float) -> float:
    return 1 - both / (guess * size) ** 0.5 if guess * size else float(guess != size)


def _worst(error: float) -> float:
    return float("inf") if error != error else error


_SUMS = {"rel_l1": _l1, "rel_l2": _squares, "cosine": _products}
_RATIO = {
    "rel_l1": lambda sums: _ratio(*sums),
    "rel_l2": lambda sums: _ratio(*sums) ** 0.5,
    "cosine": lambda sums: _cosine(*sums),
}


class Predicted(Gate):
    """Of the whole model: the output o is taken to change k times as fast as the input x, k measured between the two
    newest computed evaluations. What that predicts, relative to |o|, adds up from one computed evaluation to the next
    and stays below `threshold`. over: as Confidence, of the first prompt."""

    def __init__(self, threshold: float, over: str = "first_stream"):
        self.threshold, self.over = threshold, over
        self.last: torch.Tensor | None = None  # input of the newest evaluation
        self.x: torch.Tensor | None = None  # input and output of the newest computed one
        self.o: torch.Tensor | None = None
        self.rate: torch.Tensor | None = None  # k / mean |o|, [b or 1]
        self.total: torch.Tensor | None = None  # predicted change since then, [b or 1]

    def computes(self, seen: Seen, forced: bool) -> bool:
        now = seen.now
        assert now is not None
        self.error = None
        if self.rate is not None and self.total is not None and self.last is not None and self.last.shape == now.shape:
            self.total = self.total + self.rate * self._mean(now - self.last)
            self.error = max(self.total.tolist(), key=_worst)
        self.last = now.detach().clone()
        return forced or self.error is None or not self.error < self.threshold  # NaN computes

    def computed(self, seen: Seen, made: torch.Tensor) -> None:
        assert self.last is not None
        made = made.detach().clone()
        size = self._mean(made)
        if self.o is not None and self.x is not None and self.o.shape == made.shape:
            moved = self._mean(self.last - self.x) * size
            self.rate = torch.where(moved > 0, self._mean(made - self.o) / moved, 0.0)
        self.x, self.o, self.total = self.last, made, torch.zeros_like(size)

    def _mean(self, change: torch.Tensor) -> torch.Tensor:
        """[b, ...] -> mean |change| of each sample [b], or of all [1]."""
        rows = change.flatten(1) if self.over == "max" else change.reshape(1, -1)
        return rows.float().abs().mean(1)

    @property
    def bytes_held(self) -> int:
        """Of the three tensors of the model's input size at most; the newest input is often the computed one's."""
        return sum(t.nbytes for t in {id(t): t for t in (self.last, self.x, self.o) if t is not None}.values())
