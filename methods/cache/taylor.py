"""Taylor forecasts of a feature from its values at earlier evaluations (TaylorSeer, arXiv 2503.06923, section 3).

The paper keeps difference levels. At a computed evaluation x_n, with h = x_n - x_{n-1}:
    D_0' = F,  D_{i+1}' = (D_i' - D_i) / h,   and forecasts  F(x_n + k) ~ sum_i D_i k^i / i!.
`newton` is the interpolating polynomial of the same points, Newton's divided differences: exact up to degree `order`
on any spacing, where the paper's form is exact to degree 1 only (its differences are derivatives at mid-interval;
on c x^2 with spacing N it is off by c N k).
`hermite` is HiCache's (arXiv 2508.16984): the paper's differences under scaled Hermite polynomials in place of powers,
    F(x_n + k) ~ D_0 + sum_{i>=1} D_i s^i H_i(s k) / i!,  H_0 = 1, H_1(u) = 2u, H_{i+1}(u) = 2u H_i(u) - 2i H_{i-1}(u),
with s = 0.5, where slopes count half. H_2 has a constant, so k must be counted in steps.

All forms are linear in the last order + 1 features, with weights that depend on x alone. So the features themselves
are stored, and the weights are made on the host in double precision for each forecast. Against stored differences:
the memory is the same, order + 1 tensors; storing is one copy instead of a pass over every level; no difference is
rounded to the storage dtype; and the newest feature can be REPLACED exactly, which a recursion over its own results
cannot do without an extra level. A forecast is one pass, `kernels/cache/forecast.py`.
"""

import math
from collections.abc import Sequence

import torch

from ...kernels.cache.forecast import forecast

BASES = ("taylor_paper", "newton", "hermite")
MAX_ORDER = 4
HERMITE_SCALE = 0.5  # of HiCache on FLUX
SAME = 1e-6  # two values of x closer than this fraction of the run's scale are one evaluation


def allowed_order(basis: str, order: int, interval: int) -> int:
    """Returns `order` if `basis` may use it with one computed evaluation in `interval`; raises ValueError if not.

    Newton's polynomials of order 3 and 4 swing far outside the points they pass through: on the flows they were
    tried on they lost the trajectory as soon as the interval was longer than 3.
    """
    _check(basis, order)
    if basis == "newton" and order > 2 and interval > 3:
        raise ValueError(
            f"Newton forecasts of order {order} diverge at {f'interval {interval}' if interval < 1000 else 'any interval'}. "
            f"Use order 2 or less, an interval of 3 or less, or basis taylor_paper."
        )
    return order


def allowed_variable(basis: str, variable: str) -> str:
    """Returns `variable`, "auto", "step" or "sigma", if `basis` extrapolates over it; raises ValueError if not."""
    if basis == "hermite" and variable == "sigma":
        raise ValueError(
            "Hermite forecasts count steps, not sigmas. Set variable to auto or step, or basis taylor_paper."
        )
    return variable


def weights(basis: str, xs: Sequence[float], x: float) -> list[float]:
    """Weights w of the features F_i at the distinct points xs (newest first), so that F(x) ~ sum_i w_i F_i. They sum to 1."""
    if basis == "newton":
        return _newton(xs, x)
    factors = (_hermite if basis == "hermite" else _powers)(x - xs[0], len(xs))
    return _differences(xs, factors)


def _powers(k: float, count: int) -> list[float]:
    """k^i / i! for i < count."""
    factors = [1.0]
    for i in range(1, count):
        factors.append(factors[-1] * k / i)
    return factors


def _hermite(k: float, count: int) -> list[float]:
    """s^i H_i(s k) / i! for i < count."""
    u = HERMITE_SCALE * k
    h = [1.0, 2 * u]
    for i in range(1, count):
        h.append(2 * u * h[i] - 2 * i * h[i - 1])
    return [HERMITE_SCALE**i * h[i] / math.factorial(i) for i in range(count)]


def _differences(xs: Sequence[float], factors: Sequence[float]) -> list[float]:
    """Weights of the features in sum_i factors_i D_i. The paper's recursion, run on unit vectors: level i of D holds the
    weights of every feature in D_i."""
    count = len(xs)
    levels: list[list[float]] = []
    for index in reversed(range(count)):  # oldest first, as the evaluations came
        new = [[float(i == index) for i in range(count)]]
        for level in levels:
            h = xs[index] - xs[index + 1]
            new.append([(b - a) / h for a, b in zip(level, new[-1], strict=True)])
        levels = new
    total = [0.0] * count
    for factor, level in zip(factors, levels, strict=True):
        total = [t + factor * d for t, d in zip(total, level, strict=True)]
    return total


def _newton(xs: Sequence[float], x: float) -> list[float]:
    """Lagrange's weights: the same polynomial as Newton's divided differences, written per feature."""
    result = []
    for i, at in enumerate(xs):
        weight = 1.0
        for j, other in enumerate(xs):
            if j != i:
                weight *= (x - other) / (at - other)
        result.append(weight)
    return result


def _check(basis: str, order: int) -> None:
    if basis not in BASES:
        raise ValueError(f"Unknown basis {basis!r}. Use one of {', '.join(BASES)}.")
    if not 0 <= order <= MAX_ORDER:
        raise ValueError(f"Forecasts have order 0 to {MAX_ORDER}, got {order}. Order 0 reuses the newest feature.")


class Forecast:
    """History of one feature of one stream, and its forecast. Holds at most order + 1 tensors of the feature's size.

    `x` is the variable of the extrapolation, a step index or a sigma, always the same one within a run.
    order:        0 (reuse) to 4. Fewer stored features than order + 1 lower it for the time being.
    basis:        "taylor_paper", "newton" or "hermite".
    direction:    sign of x's progress: +1 for step indices and for inversion's rising sigmas, -1 for falling sigmas.
    scale:        largest |x| of the run; values of x within 1e-6 of it are the same evaluation.
    cache_dtype:  dtype of the stored tensors, None for the feature's own.
    cache_device: where they are held, None for the feature's device. Elsewhere the forecast is computed there too, so
                  that one tensor travels instead of order + 1.
    """

    def __init__(
        self,
        order: int = 1,
        basis: str = "taylor_paper",
        direction: int = -1,
        scale: float = 1.0,
        cache_dtype: torch.dtype | None = None,
        cache_device: torch.device | str | None = None,
    ):
        _check(basis, order)
        if direction not in (-1, 1) or not scale > 0:
            raise ValueError(f"Forecast needs direction +1 or -1 and scale > 0, got {direction} and {scale}.")
        self.order, self.basis, self.direction, self.scale = order, basis, direction, scale
        self.cache_dtype, self.cache_device = cache_dtype, cache_device
        self.reset()

    def reset(self) -> None:
        """Forgets everything and frees the tensors."""
        self._features: list[torch.Tensor] = []  # newest first
        self._xs: list[float] = []
        self._kind: tuple[torch.Size, torch.dtype, torch.device] | None = None

    @property
    def levels(self) -> int:
        """Features held; a forecast has order levels - 1, and 0 means that there is nothing to forecast from."""
        return len(self._features)

    @property
    def bytes_held(self) -> int:
        """Bytes of the stored tensors."""
        return sum(feature.nbytes for feature in self._features)

    def update(self, feature: torch.Tensor, x: float) -> None:
        """Stores a copy of a computed feature [...], any strides.

        The same x as the newest entry replaces that entry (the second model call of heun and the next step's first
        share a sigma). An x that runs against `direction` (a restart) or a feature of another shape, dtype or device
        starts a new history.
        """
        kind = (feature.shape, feature.dtype, feature.device)
        if kind != self._kind or self._progress(x) < 0:
            self.reset()
            self._kind = kind
        if self._xs and self._progress(x) == 0:
            target = self._features.pop(0)
            self._xs.pop(0)
        elif self.levels > self.order:
            target = self._features.pop()
            self._xs.pop()
        else:
            target = torch.empty(
                feature.shape, dtype=self.cache_dtype or feature.dtype, device=self.cache_device or feature.device
            )
        target.copy_(feature.detach())
        self._features.insert(0, target)
        self._xs.insert(0, float(x))

    def serves(self, x: float, like: torch.Tensor | None = None) -> bool:
        """Whether `predict(x)` extrapolates: something is stored, x is not behind it, and `like` (a tensor of the
        feature's shape, dtype and device, when given) matches."""
        same = like is None or (like.shape, like.dtype, like.device) == self._kind
        return bool(self._features) and same and self._progress(x) >= 0

    def predict(self, x: float) -> torch.Tensor:
        """The feature forecast at x: a new contiguous tensor [...] of the feature's dtype, on its device.

        Raises RuntimeError when nothing was stored.
        """
        if self._kind is None:
            raise RuntimeError("Forecast.predict has no feature to start from; compute this evaluation and update.")
        _, dtype, device = self._kind
        return forecast(*self.terms(x), dtype).to(device)

    def terms(self, x: float) -> tuple[list[torch.Tensor], list[float]]:
        """The stored features, newest first, and their weights in the forecast at x. Lent: the history goes on using them."""
        return self._features, weights(self.basis, self._xs, x)

    def _progress(self, x: float) -> int:
        """Sign of the way from the newest entry to x along `direction`; 0 when they are one evaluation, 1 if none."""
        if not self._xs:
            return 1
        way = (x - self._xs[0]) * self.direction
        return 0 if abs(way) <= SAME * self.scale else (1 if way > 0 else -1)
