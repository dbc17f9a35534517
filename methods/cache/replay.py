"""What skipping steps would cost, from recorded plain runs: without the model.

A sampler moves by x_{i+1} = x_i + (s_{i+1} - s_i) v_i. Where v_i is forecast, v_i' - v_i = sum_j C_ij v_j is known from
the plain run, so the error that skipped steps put into the latent is a linear combination of recorded predictions, and
its length follows from their products alone. What the rest of the run makes of an error put in at step i is not known:
errors of the start grow. It is taken as a factor exp(a + b u_i), u_i = 1 at the first step and 0 at the last, and a and
b are fitted to the errors of real runs as these come in.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .schedule_search import Rules, forecast_errors, search_every
from .taylor import weights

Mask = tuple[bool, ...]
GROWTHS = np.linspace(-1.0, 6.0, 57)  # of b
USUAL = (0.3, 3.0)  # a and b before anything is measured, and how sure that is
LOOSE = (2.0, 2.0)
FLOOR = 1e-12


@dataclass(frozen=True)
class Record:
    """One plain run. gram: [B, N, N], products of the predictions of each picture. size: [B], length of its final
    latent."""

    gram: np.ndarray
    size: np.ndarray


@dataclass(frozen=True)
class Measured:
    """Real runs with one setting. errors: [S, B], error of every picture's final latent relative to its length; runs:
    [S], of whole latents; full, total: mean evaluations computed and in all."""

    mask: Mask
    errors: np.ndarray
    runs: np.ndarray
    full: float
    total: float

    @property
    def error(self) -> float:
        return float(self.runs.mean())

    @property
    def spread(self) -> float:
        """How much the error of a run differs between seeds, relative; NaN where that is not known. Pictures of a batch
        count as seeds."""
        seeds, batch = self.errors.shape
        if seeds * batch < 2 or self.error <= 0:
            return math.nan
        return float(self.errors.std(ddof=1) / self.errors.mean() / math.sqrt(batch))

    def and_also(self, other: "Measured") -> "Measured":
        """Both together, of the same setting with other seeds."""
        seeds = len(self.runs), len(other.runs)
        mean = lambda a, b: float(np.average((a, b), weights=seeds))  # noqa: E731
        errors, runs = np.concatenate((self.errors, other.errors)), np.concatenate((self.runs, other.runs))
        return Measured(self.mask, errors, runs, mean(self.full, other.full), mean(self.total, other.total))


class Replay:
    """Estimates of the final error for masks of steps. sigmas: N + 1 of the schedule; x: [N], what forecasts
    extrapolate over; order: of the forecasts."""

    def __init__(self, records: Sequence[Record], sigmas: Sequence[float], x: Sequence[float], order: int):
        self.records, self.x, self.order = records, tuple(x), order
        self.n = len(self.x)
        self.moves = np.diff(np.asarray(sigmas, dtype=np.float64))
        self.late = 1 - np.arange(self.n) / max(self.n - 1, 1)
        self.measured: list[Measured] = []
        self.residuals: list[float] = []  # log of real over estimated, of each of them
        self.a, self.b = USUAL

    def coefficients(self, mask: Mask) -> np.ndarray:
        """C [N, N]: row i holds the weights of the predictions in the error of step i."""
        made = np.zeros((self.n, self.n))
        sources: list[int] = []
        for i, computed in enumerate(mask):
            if computed:
                sources = [i, *sources[: self.order]]
            else:
                made[i, sources] = weights("taylor_paper", [self.x[k] for k in sources], self.x[i])
                made[i, i] -= 1
        return made

    def raw(self, mask: Mask, growth: float) -> float:
        """The estimate with a = 0 and b = growth."""
        row = (np.exp(growth * self.late) * self.moves) @ self.coefficients(mask)
        found = []
        for record in self.records:
            square = np.einsum("i,bij,j->b", row, record.gram, row)
            found.append(math.sqrt(max(square.sum(), 0.0) / max((record.size**2).sum(), FLOOR)))
        return float(np.mean(found))

    def estimate(self, mask: Mask) -> float:
        """Mean error of a run. What real runs were off by is put right, by the nearest ones most."""
        value = math.log(max(self.raw(mask, self.b), FLOOR)) + self.a
        if self.measured:
            shares = [1 / (0.25 + _moves(mask, one.mask)) ** 2 for one in self.measured]
            value += sum(s * off for s, off in zip(shares, self.residuals, strict=True)) / sum(shares)
        return math.exp(value)

    def apart(self, mask: Mask) -> int:
        """Steps in which it differs from the nearest real run; 0 before the first."""
        return min((_moves(mask, one.mask) for one in self.measured), default=0)

    def learn(self, one: Measured) -> None:
        """Fits a and b to all real runs, near to what is usual where these do not tell."""
        self.measured.append(one)
        best = math.inf
        for growth in GROWTHS:
            off = [
                math.log(max(m.error, FLOOR)) - math.log(max(self.raw(m.mask, growth), FLOOR)) for m in self.measured
            ]
            precision = 1 / LOOSE[0] ** 2
            a = (sum(off) + USUAL[0] * precision) / (len(off) + precision)
            loss = sum((o - a) ** 2 for o in off) + ((a - USUAL[0]) / LOOSE[0]) ** 2
            loss += ((growth - USUAL[1]) / LOOSE[1]) ** 2 * 0.1
            if loss < best:
                best, self.a, self.b, self.residuals = loss, a, float(growth), [o - a for o in off]

    def schedules(self, first: int, last: int, gap: int = 0) -> list[Mask]:
        """The cheapest mask of each number of computed steps, for each number >= first of steps at the start that are
        all computed; none skips nothing."""
        gram = sum(record.gram.sum(0) for record in self.records)
        grown = np.abs(self.moves) * np.exp(self.b * self.late)
        errors = forecast_errors(np.asarray(gram), np.asarray(self.x)) * grown[None, None, :]
        if self.order == 0:
            errors = np.broadcast_to(np.einsum("iij->ij", errors)[None], errors.shape)
        found: dict[Mask, None] = {}
        for start in starts(self.n, first, last):
            rules = Rules(self.n, start, last, gap)
            for _, mask in search_every(errors, rules, pairs=self.order > 0):
                if not all(mask):
                    found[mask] = None
        return list(found)


def _moves(a: Mask, b: Mask) -> int:
    return sum(p != q for p, q in zip(a, b, strict=True))


def starts(n: int, first: int, last: int) -> list[int]:
    """Numbers of computed steps at the start to try: all of them, of long runs some 30."""
    most = n - last - 1
    return sorted({round(s) for s in np.linspace(first, most, min(30, most - first + 1))}) if most >= first else []


def head(mask: Mask) -> int:
    """Steps that are computed before the first skipped one."""
    return next((i for i, computed in enumerate(mask) if not computed), len(mask))
