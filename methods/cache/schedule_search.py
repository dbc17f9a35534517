"""Which steps to compute, for a budget: the cheapest way to cut a run into segments (DDT, arXiv 2504.05741, section 3.4).

A computed step serves the skipped steps after it, up to the next computed one. The cost of a schedule is the sum, over
its skipped steps, of the error that a recorded plain run says their fill would have had:
    reuse_cosine, reuse_rel_l1: the newest computed step stands for the skipped one; a dynamic programme over the newest.
    taylor1_error: an order-1 forecast from the newest two (one, at the start); a programme over the newest pair.
Both are exact: O(K N^2) and O(K N^3).
"""

import math
from dataclasses import dataclass

import numpy as np

from .calibration import Calibration
from .schedule import Schedule

METRICS = ("reuse_cosine", "reuse_rel_l1", "taylor1_error")
MOST_STEPS = 200  # of taylor1_error, whose table holds N^3 costs


@dataclass(frozen=True)
class Rules:
    """budget: most steps that are computed. first, last: steps at either end that always are. max_gap: most steps from
    one computed to the next, 0 for any."""

    budget: int
    first: int = 1
    last: int = 1
    max_gap: int = 0

    def check(self, steps: int) -> None:
        if self.budget < 1 or self.first < 1 or self.last < 0 or self.max_gap < 0:
            raise ValueError(
                f"Cache Schedule needs a budget and force_first of at least 1, force_last and max_gap of at least 0, got "
                f"{self.budget}, {self.first}, {self.last} and {self.max_gap}."
            )
        ends = min(steps, self.first + self.last)
        between = steps - ends
        least = ends + (math.ceil((between + 1) / self.max_gap) - 1 if self.max_gap and between else 0)
        if min(self.budget, steps) < least:
            raise ValueError(
                f"A budget of {self.budget} of {steps} steps is too small: the {self.first} first and {self.last} last "
                f"steps{f' and one in every {self.max_gap} between' if self.max_gap else ''} take {least}. Raise the "
                f"budget, or lower force_first, force_last or the speed-up."
            )

    def reach(self, steps: int) -> int:
        return self.max_gap or steps

    def must(self, steps: int) -> list[bool]:
        """Steps that are computed in any case."""
        return [i < self.first or i >= steps - self.last for i in range(steps)]


def budget_of(steps: int, speedup: float) -> int:
    """Computed steps for a wanted speed-up in evaluations."""
    return max(1, math.floor(steps / speedup + 1e-9))


def segment_errors(found: Calibration, metric: str) -> np.ndarray:
    """[N, N, N]: error of step c where a is the computed step before the newest, b; a = b means that there is none, and
    is all that the reuse metrics have. Only a <= b < c is meant."""
    n = found.steps
    if metric == "reuse_cosine":
        return np.broadcast_to(1 - np.asarray(found.cosine), (n, n, n))
    if metric == "reuse_rel_l1":
        return np.broadcast_to(np.asarray(found.rel_l1), (n, n, n))
    if metric != "taylor1_error":
        raise ValueError(f"Unknown metric {metric!r}. Use one of {', '.join(METRICS)}.")
    if n > MOST_STEPS:
        raise ValueError(f"taylor1_error serves up to {MOST_STEPS} steps, got {n}. Use reuse_rel_l1.")
    gram = np.asarray(found.gram)
    return forecast_errors(gram, np.asarray(found.places)) / np.sqrt(np.maximum(np.diag(gram), 1e-30))[None, None, :]


def forecast_errors(gram: np.ndarray, x: np.ndarray) -> np.ndarray:
    """[N, N, N]: length of the error of order-1 forecasts, from products [N, N] of features at x [N]; with a = b of
    reuse."""
    own = np.diag(gram)
    a, b, c = x[:, None, None], x[None, :, None], x[None, None, :]
    ratio = np.where(a == b, 0.0, (c - b) / np.where(a == b, 1.0, b - a))  # F_b + ratio (F_b - F_a) - F_c
    u, v = 1 + ratio, -ratio
    gab, gbc, gac = gram[:, :, None], gram[None, :, :], gram[:, None, :]
    square = u * u * own[None, :, None] + v * v * own[:, None, None] + own[None, None, :]
    square = square + 2 * (u * v * gab - u * gbc - v * gac)
    return np.sqrt(np.maximum(square, 0.0))


def cost(errors: np.ndarray, mask: list[bool] | tuple[bool, ...]) -> float:
    """Sum of the errors [N, N, N] of the skipped steps."""
    total, newest, before = 0.0, 0, 0
    for c, computed in enumerate(mask):
        if computed:
            before, newest = (newest if c else 0), c
        else:
            total += float(errors[before, newest, c])
    return total


def search(found: Calibration, metric: str, rules: Rules) -> tuple[Schedule, float]:
    """The cheapest schedule of at most `budget` computed steps, and its cost; of equal ones that with the fewest."""
    errors = segment_errors(found, metric)
    every = search_every(errors, rules, pairs=metric == "taylor1_error")
    least = min(total for total, _ in every)
    total, mask = next(one for one in every if one[0] <= least * (1 + 1e-12))
    return Schedule(mask, found.sigmas), total


def search_every(errors: np.ndarray, rules: Rules, pairs: bool) -> list[tuple[float, tuple[bool, ...]]]:
    """(cost, mask) of the cheapest schedule of each number of computed steps up to the budget that the rules allow.

    errors [N, N, N]; pairs: whether they depend on the newest two computed steps, else on the newest alone."""
    rules.check(len(errors))
    return _by_pair(errors, rules) if pairs else _by_newest(errors[0], rules)


Found = list[tuple[float, tuple[bool, ...]]]


def _by_newest(errors: np.ndarray, rules: Rules) -> Found:
    """errors [N, N]: row b serves column c. best[b]: least cost of the steps before b with b computed as the k-th."""
    n = len(errors)
    segment = _segments(errors[None], rules)[0]  # [b, e]: b computed, then skipped up to e (excluded)
    best = np.full(n, np.inf)
    best[0] = 0.0
    came: list[np.ndarray] = []
    found: Found = []
    for k in range(min(rules.budget, n)):
        if k:
            through = best[:, None] + segment[:, :n]  # [b, e]
            came.append(through.argmin(0))
            best = through.min(0)
        ends = best + segment[:, n]
        at = int(ends.argmin())
        if np.isfinite(ends[at]):
            computed = [at]
            for row in reversed(came):
                computed.append(int(row[computed[-1]]))
            found.append((float(ends[at]), tuple(i in computed for i in range(n))))
    return found


def _by_pair(errors: np.ndarray, rules: Rules) -> Found:
    """errors [N, N, N]; the same with best[a, b] for the newest two; [0, 0] is the start."""
    n = len(errors)
    segment = _segments(errors, rules)  # [a, b, e]
    best = np.full((n, n), np.inf)
    best[0, 0] = 0.0
    came: list[np.ndarray] = []
    found: Found = []
    for k in range(min(rules.budget, n)):
        if k:
            through = best[:, :, None] + segment[:, :, :n]  # [a, b, e] -> best[b, e]
            came.append(through.argmin(0))
            best = through.min(0)
        ends = best + segment[:, :, n]
        a, b = (int(i) for i in np.unravel_index(int(ends.argmin()), ends.shape))
        if np.isfinite(ends[a, b]):
            computed, total = [b], float(ends[a, b])
            for row in reversed(came):
                a, b = int(row[a, b]), a
                computed.append(b)
            found.append((total, tuple(i in computed for i in range(n))))
    return found


def _segments(errors: np.ndarray, rules: Rules) -> np.ndarray:
    """errors [A, N, N] -> costs [A, N, N + 1] of computing b and skipping from b + 1 up to e, excluded; infinite where
    a rule forbids it. e = N is the end of the run."""
    n = errors.shape[-1]
    must = rules.must(n)
    segment = np.full((len(errors), n, n + 1), np.inf)
    for b in range(n):
        total = np.zeros(len(errors))
        for e in range(b + 1, min(n, b + rules.reach(n)) + 1):
            segment[:, b, e] = total
            if e < n:
                if must[e]:
                    break
                total = total + errors[:, b, e]
    return segment
