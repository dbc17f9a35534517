"""Optimal Linear Subspace Search (arXiv 2305.14677): a sampler of K steps whose coefficients are fitted to recorded runs.

A teacher of N steps gives states x_0 (noise) .. x_N and velocities v_i = (x_i - denoised_i) / sigma_i. The student visits
points p_0 = 0 < .. < p_K = N, evaluates at the first K of them, and sets

    x_{p_{k+1}} = a_k x_0 + sum_{j <= k} b_kj v_{p_j}

with (a_k, b_k) of least squared error over all recorded runs. Plain least squares explodes where early velocities are
nearly the same, so the columns are normed and the difference to a known rule (the prior) is held small by a ridge. Only
the inner products of a run's vectors are needed.

The teacher's velocities are not those that the student meets: its states are a little off. Once it has run, the same fit
is made again with its own velocities and the teacher's states (the case of a trajectory of K steps, each visited)."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

PATHS = ("uniform", "graph", "auto", "karras")
PRIORS = ("euler", "ab2", "zero")
RHO = 7.0  # of the karras path
HALVINGS = 30
SHARES = (0.5, 0.0, 1.0, 0.25, 0.75)  # of the even path in what auto tries, in that order
Grams = torch.Tensor  # float64 [S, 2 N + 1, 2 N + 1]: x_0 .. x_N, v_0 .. v_{N-1} of each of S runs


@dataclass(frozen=True, eq=False)
class Table:
    """sigmas: K + 1 numbers; a [K], b [K, K] lower triangular, float64. about: what it was made for."""

    sigmas: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    about: dict[str, str] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return len(self.a)

    @property
    def largest(self) -> float:
        return float(torch.cat([self.a, self.b.flatten()]).abs().max())


def gram(states: torch.Tensor, velocities: torch.Tensor) -> torch.Tensor:
    """states [N + 1, n], velocities [N, n] -> their inner products over n, float64 [2 N + 1, 2 N + 1]."""
    every = torch.cat([states, velocities]).double()
    return every @ every.T / every.shape[1]


def prior_row(sigmas: Sequence[float], k: int, prior: str) -> tuple[float, list[float]]:
    """(a, b_0 .. b_k) of the rule itself, from x_0 up to the point k + 1 of the student's own schedule."""
    if prior == "zero":
        return 0.0, [0.0] * (k + 1)
    steps = [sigmas[j + 1] - sigmas[j] for j in range(k + 1)]
    row = list(steps)
    if prior == "ab2":
        for j in range(1, k + 1):
            more = steps[j] * steps[j] / (2 * steps[j - 1])
            row[j] += more
            row[j - 1] -= more
    return 1.0, row


def fit_row(
    grams: Grams, sigmas: Sequence[float], path: Sequence[int], k: int, ridge: float, prior: str
) -> tuple[torch.Tensor, float]:
    """((a_k, b_k0 .. b_kk), mean squared error) of the step that ends at path[k + 1]."""
    last = len(sigmas) - 1
    total = grams.sum(0)
    basis = [0, *(last + 1 + p for p in path[: k + 1])]
    inner = total[basis][:, basis]
    cross = total[basis, path[k + 1]]
    first, rest = prior_row([sigmas[p] for p in path], k, prior)
    start = torch.tensor([first, *rest], dtype=torch.float64)
    norm = inner.diagonal().sqrt().clamp_min(1e-30)
    normed = inner / norm[:, None] / norm[None]
    wanted = (cross - inner @ start) / norm
    values, vectors = torch.linalg.eigh(normed)
    values = values.clamp_min(0) + ridge
    inverse = torch.where(values > 1e-13 * values.max(), 1 / values, 0)  # what the runs do not tell stays as the prior
    found = start + vectors @ (inverse * (vectors.T @ wanted)) / norm
    return found, row_error(grams, path, k, found, last) / len(grams)


def row_error(grams: Grams, path: Sequence[int], k: int, row: torch.Tensor, last: int) -> float:
    """Squared error of that step, summed over the runs, with the teacher's velocities."""
    every = [path[k + 1], 0, *(last + 1 + p for p in path[: k + 1])]
    weights = torch.cat([row.new_tensor([-1.0]), row])
    return float((weights @ grams.sum(0)[every][:, every] @ weights).clamp_min(0))


def solve(
    grams: Grams,
    sigmas: Sequence[float],
    path: Sequence[int],
    ridge: float,
    prior: str,
    weights: torch.Tensor | None = None,
) -> Table:
    """The table of one path. weights [S, K]: how much each run counts in each step, all alike without them."""
    steps = len(path) - 1
    a, b = torch.zeros(steps, dtype=torch.float64), torch.zeros(steps, steps, dtype=torch.float64)
    for k in range(steps):
        counted = grams if weights is None else grams * weights[:, k, None, None]
        row, _ = fit_row(counted, sigmas, path, k, ridge, prior)
        a[k], b[k, : k + 1] = row[0], row[1:]
    return Table(torch.tensor([sigmas[p] for p in path], dtype=torch.float64), a, b)


def trust(off: torch.Tensor, scale: float) -> torch.Tensor:
    """[S, K] from the mean squares [S, K] by which runs are off the teacher's before each step: a run that has left its
    teacher's way, to another picture say, tells little of how to follow it. scale: a mean square of the states."""
    weights = 1 / (off + off.median(0).values + 1e-8 * scale)
    return weights / weights.mean(0)


def combine(table: Table, k: int, start: torch.Tensor, velocities: Sequence[torch.Tensor]) -> torch.Tensor:
    """The state after step k, from the first one and the velocities up to now."""
    made = start * float(table.a[k])
    for weight, velocity in zip(table.b[k].tolist(), velocities, strict=False):
        made = made + velocity * weight
    return made


def fit_error(grams: Grams, table: Table, path: Sequence[int]) -> float:
    """Of the last state relative to the teacher's, root mean square, with the teacher's velocities."""
    last = (grams.shape[-1] - 1) // 2
    row = torch.cat([table.a[-1:], table.b[-1]])
    want = float(grams[:, path[-1], path[-1]].sum())
    return (row_error(grams, path, table.steps - 1, row, last) / max(want, 1e-30)) ** 0.5


def uniform_path(points: int, steps: int) -> list[int]:
    """steps + 1 points of 0 .. points, evenly spaced in the teacher's own schedule."""
    return [round(i * points / steps) for i in range(steps + 1)]


def karras_path(sigmas: Sequence[float], steps: int) -> list[int]:
    """The points nearest to Karras' schedule between the first and the last sigma above 0."""
    points = len(sigmas) - 1
    high, low = sigmas[0] ** (1 / RHO), max(sigmas[-1], sigmas[-2] if sigmas[-1] == 0 else sigmas[-1]) ** (1 / RHO)
    wanted = [(high + i / max(steps - 1, 1) * (low - high)) ** RHO for i in range(steps)]
    path = [0]
    for i in range(1, steps):
        near = min(range(points), key=lambda p: abs(sigmas[p] - wanted[i]))
        path.append(min(max(near, path[-1] + 1), points - (steps - i)))
    return [*path, points]


def graph_path(grams: Grams, sigmas: Sequence[float], steps: int, ridge: float, prior: str) -> list[int]:
    """Each step goes as far as its error stays below a limit; the limit is the least one that reaches the end in time."""
    points = len(sigmas) - 1
    if steps == points:
        return uniform_path(points, steps)
    scale = float(grams[:, 0, 0].mean())
    low, high = -40.0, 5.0  # of the limit's binary logarithm, relative to the noise
    best = uniform_path(points, steps)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        path = _walk(grams, sigmas, steps, 2.0**middle * scale, ridge, prior)
        if path is None:
            low = middle
        else:
            high, best = middle, path
    while len(best) <= steps:  # fewer do: the longest step is taken as two
        i = max(range(len(best) - 1), key=lambda j: best[j + 1] - best[j])
        best = [*best[: i + 1], (best[i] + best[i + 1]) // 2, *best[i + 1 :]]
    return best


def between(one: Sequence[int], other: Sequence[int], share: float) -> list[int]:
    """The path that is `share` of the way from one to the other, rounded; it rises as both do."""
    path = [round(a + share * (b - a)) for a, b in zip(one, other, strict=True)]
    for i in range(1, len(path)):
        path[i] = max(path[i], path[i - 1] + 1)
    path[-1] = one[-1]
    for i in range(len(path) - 2, 0, -1):
        path[i] = min(path[i], path[i + 1] - 1)
    return path


def moved(path: Sequence[int], chance: random.Random) -> list[int] | None:
    """The path with one of its inner points elsewhere between its neighbours; None where none can move."""
    free = [k for k in range(1, len(path) - 1) if path[k + 1] - path[k - 1] > 2]
    if not free:
        return None
    k = chance.choice(free)
    places = [p for p in range(path[k - 1] + 1, path[k + 1]) if p != path[k]]
    return [*path[:k], chance.choice(places), *path[k + 1 :]]


def _walk(grams, sigmas, steps: int, limit: float, ridge: float, prior: str) -> list[int] | None:
    """The greedy path under that limit, None where it needs more than `steps` steps."""
    points, path = len(sigmas) - 1, [0]
    while path[-1] < points:
        if len(path) > steps:
            return None
        low, high = path[-1] + 1, points
        while low < high:
            middle = (low + high + 1) // 2
            _, error = fit_row(grams, sigmas, [*path, middle], len(path) - 1, ridge, prior)
            low, high = (middle, high) if error <= limit else (low, middle - 1)
        path.append(low)
    return path


def paths_of(kind: str, grams: Grams, sigmas: Sequence[float], steps: int, ridge: float, prior: str) -> list[list[int]]:
    """The path of that kind; of auto the one halfway between the searched and the even path, then these and others
    between, of which trial runs choose. ValueError where the teacher has fewer steps than the student."""
    points = len(sigmas) - 1
    if not 1 <= steps <= points:
        raise ValueError(f"steps {steps} must be at most the {points} steps of the recorded runs; record longer ones.")
    even = uniform_path(points, steps)
    if kind == "uniform":
        return [even]
    if kind == "karras":
        return [karras_path(sigmas, steps)]
    found = graph_path(grams, sigmas, steps, ridge, prior)
    if kind == "graph":
        return [found]
    return [between(found, even, share) for share in SHARES]
