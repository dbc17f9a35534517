"""FoCa forecasts (arXiv 2508.16211): features follow an ODE, which is integrated from one skipped evaluation to the next.

Predictor, two-step (BDF2 with its implicit slope taken from the past): P = F_k + h s, s = (F_k - F_{k-1}) / (x_k - x_{k-1})
over the last two values, computed or forecast; with equal steps 2 F_k - F_{k-1}. Corrector (Heun): half of the
step is taken with the slope S of the last two COMPUTED features instead, so that forecasts cannot run away from them:
    F = F_k + h (s + S) / 2.
With equal steps this is cache-dit's form; the slopes make it right on any spacing, where the differences alone are not.

Between computed evaluations every value is a linear combination of three tensors: the last two computed features, and
the last forecast before the newer one. Their weights are scalars on the host, so a forecast is one pass.
"""

import torch

from ...kernels.cache.forecast import forecast
from .taylor import SAME, Forecast

Weights = list[float]  # of the basis: newest computed feature, the one before, the last forecast between them
NEWEST, BEFORE, BETWEEN = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]


class FoCa(Forecast):
    """Same interface and storage as Forecast; `order` and `basis` have no meaning here. Holds at most three tensors."""

    def reset(self) -> None:
        super().reset()
        self._between: torch.Tensor | None = None
        self._values: list[tuple[float, Weights]] = []  # (x, weights) of the last two values, newest first

    @property
    def bytes_held(self) -> int:
        return super().bytes_held + (self._between.nbytes if self._between is not None else 0)

    def update(self, feature: torch.Tensor, x: float) -> None:
        kind = (feature.shape, feature.dtype, feature.device)
        if kind != self._kind or self._progress(x) < 0:
            self.reset()
        # the value that the next predictor looks back to: the last one, or the one before a feature at the same x
        behind = next((value for value in self._values if abs(value[0] - x) > SAME * self.scale), None)
        between = self._between
        if behind is not None and behind[1] not in (BEFORE, BETWEEN):
            between = None if behind[1] == NEWEST else self._sum(behind[1])
            behind = (behind[0], BEFORE if between is None else BETWEEN)
        super().update(feature, x)
        self._between = between if behind is not None else None
        self._values = [(float(x), NEWEST), *([behind] if behind is not None else [])]

    def predict(self, x: float) -> torch.Tensor:
        """The value at x; asked again for the same x it is the same. RuntimeError when nothing was stored."""
        if self._kind is None:
            raise RuntimeError("FoCa.predict has no feature to start from; compute this evaluation and update.")
        newest, weights = self._values[0]
        if len(self._values) > 1 and len(self._xs) > 1 and abs(x - newest) > SAME * self.scale:
            weights = self._next(x)
            self._values = [(float(x), weights), self._values[0]]
        _, dtype, device = self._kind
        return self._sum(weights, dtype).to(device)

    def _next(self, x: float) -> Weights:
        (at, now), (earlier, before) = self._values[:2]
        h, gap = x - at, self._xs[0] - self._xs[1]
        local = [(a - b) / (at - earlier) for a, b in zip(now, before, strict=True)]
        anchor = [1 / gap, -1 / gap, 0.0]
        return [w + h * (s + a) / 2 for w, s, a in zip(now, local, anchor, strict=True)]

    def _sum(self, weights: Weights, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensors, used = [*self._features], weights[: len(self._features)]
        if self._between is not None:
            tensors, used = [*tensors, self._between], [*used, weights[2]]
        return forecast(tensors, used, dtype or self._features[0].dtype)
