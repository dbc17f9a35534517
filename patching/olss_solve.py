"""Solve OLSS: sigmas and coefficients from recorded runs, tried by sampling the seeds that were learnt from, and judged on
others."""

import dataclasses
import math
import random
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch

from ..methods.sampling import olss
from .olss import Trajectory, Watched, flat, sampler_of
from .sampling import Progress, metered, sample

RIVALS = ("euler", "dpmpp_2m")
REFITS = 3
HOPE = 3.0  # how much worse a first fit may be than the best student for a second to be made


@dataclass(frozen=True)
class Asked:
    """The node's inputs."""

    steps: int
    path: str
    ridge: float
    prior: str
    holdout: float
    check: bool
    trials: int


def split(runs: int, holdout: float) -> int:
    """How many seeds, the last ones, have no part in the fit; at least one learns, and one is held out where there are
    two and holdout is above 0."""
    return min(max(round(runs * holdout), 1 if holdout > 0 else 0), runs - 1)


def solve(trajectory: Trajectory, asked: Asked) -> tuple[olss.Table, list[str]]:
    """(table, lines of a report). The held-out seeds judge what was chosen, and have no part in it."""
    held = split(len(trajectory.jobs), asked.holdout)
    learnt = len(trajectory.jobs) - held
    count = learnt * trajectory.finals[0].shape[0]
    sigmas = trajectory.sigmas
    grams, judged = trajectory.grams[:count], trajectory.grams[count:]
    paths = olss.paths_of(asked.path, grams, sigmas, asked.steps, asked.ridge, asked.prior)
    progress = Progress(asked.steps * (asked.trials * learnt + (held * (1 + len(RIVALS)) if asked.check else 0)))
    runs = Runs(trajectory, learnt, asked, progress)
    search = Search(runs, grams, paths, asked)
    table, points = search.table, search.points
    about = {**trajectory.about, "path": asked.path, "ridge": f"{asked.ridge:g}", "prior": asked.prior}
    table = dataclasses.replace(table, about=about)
    lines = [
        f"OLSS of {asked.steps} steps, {asked.path} path {', '.join(map(str, points))} of {len(sigmas) - 1}",
        f"fitted to {count} pictures; largest coefficient {table.largest:.3g}",
    ]
    if asked.trials:
        lines.append(f"after {search.made} trials: {search.error:.4f} on the seeds learnt from")
    if asked.check and held:
        lines.append(f"held-out seeds ({held}), difference to the {trajectory.about['teacher']} steps of the teacher:")
        lines.append(f"  OLSS, {asked.steps} steps: {runs.judge(sampler_of(table), table.sigmas.float()):.4f}")
        lines += [f"  {name}, {asked.steps} steps: {runs.rival(name):.4f}" for name in RIVALS]
    elif held:
        error = olss.fit_error(judged, olss.solve(grams, sigmas, points, asked.ridge, asked.prior), points)
        lines.append(f"held-out pictures, with the teacher's velocities: error {error:.4f}")
    return table, lines


@dataclass(frozen=True, eq=False)
class Met:
    """What a student met in the runs of the learnt seeds: olss.Grams [S, 2 K + 1, 2 K + 1] of the teacher's states at its
    points and of its own velocities; off [S, K], mean squares by which it was off the teacher before each step."""

    grams: torch.Tensor
    off: torch.Tensor


class Runs:
    """Runs of few steps, compared with the teacher's: from the seeds that were learnt from, or the held-out ones."""

    def __init__(self, trajectory: Trajectory, learnt: int, asked: Asked, progress: Progress):
        self.plain, self.trajectory, self.asked, self.progress = metered(trajectory.model), trajectory, asked, progress
        self.learnt = list(range(learnt))  # the hardest first, once they are known
        self.held = range(learnt, len(trajectory.jobs))

    def error(self, number: int, sampler: Any, sigmas: torch.Tensor) -> float:
        """Of that job, relative to the teacher's latent."""
        job = dataclasses.replace(self.trajectory.jobs[number], sampler=sampler, sigmas=sigmas)
        got = flat(sample(self.plain, job, self.progress.step).samples)
        found = relative(got, self.trajectory.finals[number])
        return found if math.isfinite(found) else math.inf

    def learn(self, table: olss.Table, points: list[int], limit: float) -> tuple[float, Met | None]:
        """(mean error on the learnt seeds, what was met); (inf, None) as soon as it cannot be below the limit."""
        student = Watched(table, self.trajectory.elements)
        errors: dict[int, float] = {}
        grams, off = {}, {}
        for number in self.learnt:
            if sum(errors.values()) >= limit * len(self.learnt):
                return math.inf, None
            errors[number] = self.error(number, comfy.samplers.KSAMPLER(student), table.sigmas.float())
            if errors[number] == math.inf:
                return math.inf, None
            wanted = self.trajectory.states[number][:, points]
            own, velocities = (torch.stack(v, 1) for v in (student.kept.states, student.kept.velocities))
            grams[number] = torch.stack([olss.gram(x, v) for x, v in zip(wanted, velocities, strict=True)])
            off[number] = (own - wanted)[:, :-1].double().pow(2).mean(2)
        order = sorted(errors)
        self.learnt = sorted(order, key=errors.__getitem__, reverse=True)
        met = Met(torch.cat([grams[n] for n in order]), torch.cat([off[n] for n in order]))
        return sum(errors.values()) / len(errors), met

    def judge(self, sampler: Any, sigmas: torch.Tensor) -> float:
        """Mean error on the held-out seeds."""
        return sum(self.error(number, sampler, sigmas) for number in self.held) / len(self.held)

    def rival(self, name: str) -> float:
        """A sampler of core, evenly spaced in the teacher's schedule."""
        known = self.trajectory.sigmas
        even = [known[p] for p in olss.uniform_path(len(known) - 1, self.asked.steps)]
        return self.judge(comfy.samplers.sampler_object(name), torch.tensor(even))


class Search:
    """The best of some trials, each a pass over the learnt seeds. A path takes two: with the fit to the recorded velocities,
    and with that to what this student met. Of auto all its paths are tried, then the best one with single points moved. The
    last trials go on fitting the best to what it meets. Without trials it is the first path's fit."""

    def __init__(self, runs: Runs, grams: torch.Tensor, paths: list[list[int]], asked: Asked):
        self.runs, self.grams, self.asked, self.made = runs, grams, asked, 0
        self.points = paths[0]
        self.table = self.fitted(paths[0])
        self.error, self.met = math.inf, None
        self.tried: set[tuple[int, ...]] = set()
        for points in paths:
            self.attempt(points)
        if len(paths) > 1:
            self.move(asked.trials - min(REFITS, asked.trials // 4))
        for _ in range(REFITS):
            if self.met is None or not self.passed(self.refitted(self.met, self.points), self.points, 1):
                break

    def fitted(self, points: list[int]) -> olss.Table:
        return olss.solve(self.grams, self.runs.trajectory.sigmas, points, self.asked.ridge, self.asked.prior)

    def refitted(self, met: Met, points: list[int]) -> olss.Table:
        """By the velocities that a student of these points met."""
        known = self.runs.trajectory.sigmas
        weights = olss.trust(met.off, float(met.grams[:, 0, 0].mean()))
        sigmas = [known[p] for p in points]
        return olss.solve(met.grams, sigmas, range(len(points)), self.asked.ridge, self.asked.prior, weights)

    def attempt(self, points: list[int]) -> None:
        """Two passes, if the first is not far behind the best."""
        self.tried.add(tuple(points))
        met = self.passed(self.fitted(points), points, HOPE)
        if met is not None:
            self.passed(self.refitted(met, points), points, 1)

    def passed(self, table: olss.Table, points: list[int], hope: float) -> Met | None:
        """What that table met; None where no trial is left, or its error is above the least up to now times hope."""
        if self.made >= self.asked.trials:
            return None
        self.made += 1
        error, met = self.runs.learn(table, points, hope * self.error)
        if met is not None and error < self.error:
            self.table, self.points, self.error, self.met = table, points, error, met
        return met

    def move(self, until: int) -> None:
        """Trials of the best path with a point moved, until there are about that many of all."""
        chance = random.Random(0)
        for _ in range(10 * until):
            points = olss.moved(self.points, chance)
            if points is None or self.made >= until:
                return
            if tuple(points) not in self.tried:
                self.attempt(points)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm().clamp_min(1e-12))
