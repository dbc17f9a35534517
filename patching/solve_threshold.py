"""Solve Threshold: plain runs are recorded, settings replayed, and the promising ones really run."""

import copy
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..methods.cache.profile import Profile
from ..methods.cache.replay import Measured, Record, Replay
from ..methods.cache.schedule import Schedule
from ..methods.cache.solver import Goal, best, by_schedule, by_threshold
from .cache import CacheFeature
from .gate_replay import HIGH, LOW, GateReplay, with_threshold
from .run import FEATURES, features_of, sampler_name
from .sampling import Job, Outcome, Progress, metered, sample
from .sizes import fingerprint

NAME = "Solve Threshold"
KEPT = 1 << 15  # numbers of each picture's predictions that are kept of every step
NO_THRESHOLD = "{} decides by no threshold. Set knob to schedule."
KNOBS = ("auto", "threshold", "schedule")
FINALISTS = 3  # settings that are run with as many seeds again, which had no part in finding them


@dataclass(frozen=True)
class Asked:
    """knob: what is varied; auto takes the threshold of a cache that has one. seeds: of which every setting is run.
    rounds: most settings that are really run."""

    goal: Goal
    knob: str = "auto"
    seeds: int = 4
    rounds: int = 8


@dataclass(frozen=True)
class Tried:
    """One setting that was really run."""

    setting: Any  # a threshold, or a mask of steps
    feature: CacheFeature
    found: Measured
    confirmed: bool = False  # by seeds that had no part in finding it


@dataclass
class Plain:
    """What the plain runs of all seeds gave."""

    jobs: list[Job] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)  # [B, n] each
    records: list[Record] = field(default_factory=list)


class Watch:
    """Keeps a thinned prediction (x - denoised) / sigma of every step."""

    def __init__(self, sigmas: Sequence[float]):
        self.sigmas = sigmas
        self.kept: dict[int, torch.Tensor] = {}
        self.last: torch.Tensor | None = None

    def __call__(self, step: int, denoised: Any, x: Any) -> None:
        clean = _pictures(denoised)
        part = -(-clean.shape[1] // KEPT)
        self.last = clean[:, ::part].float().cpu()
        sigma = max(abs(self.sigmas[step]), 1e-6)
        self.kept[step] = (_pictures(x)[:, ::part].float().cpu() - self.last) / sigma

    def record(self) -> Record:
        assert self.last is not None
        steps = range(len(self.sigmas) - 1)
        if any(i not in self.kept for i in steps):
            raise ValueError(f"{NAME} was not told every step by this sampler; choose another one.")
        every = torch.stack([self.kept[i] for i in steps]).double()  # [N, B, n]
        return Record(torch.einsum("ibk,jbk->bij", every, every).numpy(), self.last.double().norm(dim=1).numpy())


def _pictures(latent: Any) -> torch.Tensor:
    """A latent [B, ...], or several of one batch, as [B, n]."""
    parts = latent.unbind() if getattr(latent, "is_nested", False) else [latent]
    return torch.cat([p.detach().reshape(p.shape[0], -1) for p in parts], 1)


def cache_of(model: Any) -> CacheFeature:
    """The cache on a MODEL. ValueError where there is none, or one that cannot act."""
    found = [f for f in features_of(model.model_options) if isinstance(f, CacheFeature)]
    if not found or found[0].inactive:
        why = f" ({found[0].inactive})" if found else ""
        raise ValueError(
            f"{NAME} found no cache of evaluations on this MODEL{why}. Connect the MODEL after Taylor Cache, Confidence Taylor "
            "Cache or Step Cache."
        )
    return found[0]  # two are refused when the second is attached


def swapped(model: Any, old: CacheFeature, new: CacheFeature | None) -> Any:
    """The MODEL with another cache, or none, in the place of its own."""
    patched = model.clone()
    options = patched.model_options["transformer_options"]
    options[FEATURES] = tuple(
        new if f is old else f for f in options[FEATURES] if f is not old or new is not None
    )  # fmt: skip
    return patched


def seeded(job: Job, number: int) -> Job:
    """The job from another seed."""
    noise = job.noise
    if number:
        noise = copy.copy(noise)
        noise.seed = (noise.seed + number) % 2**64  # a seed that a generator takes
    return dataclasses.replace(job, noise=noise)


def solve(model: Any, job: Job, asked: Asked) -> tuple[Any, Profile, list[str], list[Tried]]:
    """(MODEL with the setting that was found, its profile, lines of a report, all that was tried)."""
    feature = cache_of(model)
    knob = _knob(feature, asked.knob)
    steps = len(job.sigmas) - 1
    if steps < 4:
        raise ValueError(f"{NAME} needs a schedule of at least 4 steps, got {max(steps, 0)}; raise the steps.")
    again = 1 + FINALISTS if asked.goal.error is not None else 0
    progress = Progress(steps * asked.seeds * (1 + asked.rounds + again))
    replayed = GateReplay(feature) if knob == "threshold" else None
    plain = _plain_runs(model, feature, job, asked.seeds, progress, replayed)
    if replayed is not None and replayed.threshold is None:
        if asked.knob == "threshold":
            raise ValueError(NO_THRESHOLD.format(feature.name))
        knob, replayed = "schedule", None
    replay = _replay(model, feature, job, plain)
    tried: list[Tried] = []

    def run(setting: Any) -> Measured:
        setting = round(setting, 6) if knob == "threshold" else setting  # as the profile tells it
        new = with_threshold(feature, setting) if knob == "threshold" else _scheduled(feature, setting, job)
        new = dataclasses.replace(new, profile=None, schedule=None if knob == "threshold" else new.schedule)
        found = _measure(model, feature, new, plain, progress, steps)
        tried.append(Tried(setting, new, found))
        return found

    if replayed is not None:
        guess = _guess(asked.goal, replay, replayed, replayed.threshold or LOW)
        by_threshold(asked.goal, guess, run, asked.rounds, LOW, HIGH)
    else:
        masks = replay.schedules(min(max(feature.warmup, 1), steps - 2), min(feature.tail_full, steps - 2))
        by_schedule(asked.goal, replay, masks, run, asked.rounds)
    if asked.goal.error is not None:
        tried = _confirmed(model, feature, job, asked, tried, progress)
    chosen = tried[best(asked.goal, [(t.setting, t.found) for t in tried if t.confirmed or not again])]
    profile = _profile(model, job, knob, chosen, asked)
    made = swapped(model, feature, dataclasses.replace(chosen.feature, profile=profile))
    return made, profile, _lines(asked, knob, chosen, tried), tried


def _knob(feature: CacheFeature, knob: str) -> str:
    """threshold where a gate decides; whether it has one shows when it is made."""
    has = feature.gate is not None
    if knob == "threshold" and not has:
        raise ValueError(NO_THRESHOLD.format(feature.name))
    if has and feature.off and knob != "schedule":
        raise ValueError(f"{feature.name} is off. Set its threshold above 0, so that {NAME} may change it.")
    return ("threshold" if has else "schedule") if knob == "auto" else knob


def _confirmed(model, feature, job: Job, asked: Asked, tried: list[Tried], progress: Progress) -> list[Tried]:
    """What was tried, the finalists first: run with fresh seeds too, for of several settings the one that looks best on
    the seeds of the search looks better there than elsewhere."""
    order = sorted(tried, key=lambda t: asked.goal.risk(t.found))
    fresh = _plain_runs(model, feature, job, asked.seeds, progress, None, asked.seeds)
    steps = len(job.sigmas) - 1
    sure = []
    for one in order[:FINALISTS]:
        more = _measure(model, feature, one.feature, fresh, progress, steps)
        sure.append(dataclasses.replace(one, found=one.found.and_also(more), confirmed=True))
    return [*sure, *order[FINALISTS:]]


def _plain_runs(
    model, feature, job: Job, seeds: int, progress: Progress, replayed: GateReplay | None, first: int = 0
) -> Plain:
    plain = Plain()
    bare = metered(swapped(model, feature, None))
    for number in range(first, first + seeds):
        watch = Watch([float(s) for s in job.sigmas])
        looks = number == 0 and replayed is not None  # computes all as well, and shows the gate what there is
        used = swapped(model, feature, replayed.recording()) if looks and replayed is not None else bare
        one = seeded(job, number)
        outcome = sample(used, one, progress.step, watch=watch)
        plain.jobs.append(one)
        plain.latents.append(_pictures(outcome.samples).float())
        plain.records.append(watch.record())
    return plain


def _replay(model: Any, feature: CacheFeature, job: Job, plain: Plain) -> Replay:
    sigmas = [float(s) for s in job.sigmas]
    x = sigmas[:-1] if feature.variable == "sigma" else [float(i) for i in range(len(sigmas) - 1)]
    order = 0 if feature.residual else min(feature.order, 1)
    return Replay(plain.records, sigmas, x, order)


def _scheduled(feature: CacheFeature, mask: Sequence[bool], job: Job) -> CacheFeature:
    sigmas = tuple(float(s) for s in job.sigmas[:-1])
    return dataclasses.replace(feature, schedule=Schedule(tuple(mask), sigmas))


def _measure(model, old: CacheFeature, new: CacheFeature, plain: Plain, progress: Progress, steps: int) -> Measured:
    errors, runs, full, total = [], [], 0, 0
    mask = (True,) * steps
    used = swapped(model, old, new)
    for number, (job, want) in enumerate(zip(plain.jobs, plain.latents, strict=True)):
        outcome = sample(used, job, progress.step)
        off = _pictures(outcome.samples).float() - want
        errors.append((off.norm(dim=1) / want.norm(dim=1).clamp_min(1e-12)).tolist())
        runs.append(float(off.norm() / want.norm().clamp_min(1e-12)))
        facts = _facts(outcome, new)
        full, total = full + facts["full"], total + facts["full"] + facts["forecast"]
        if number == 0:
            mask = _mask(facts, steps)
    seeds = len(plain.jobs)
    every, whole = (torch.tensor(rows, dtype=torch.float64).numpy() for rows in (errors, runs))
    return Measured(mask, every, whole, full / seeds, total / seeds)


def _facts(outcome: Outcome, feature: CacheFeature) -> dict[str, Any]:
    return next(f["facts"] for f in outcome.record["features"] if f["name"] == feature.name)


def _mask(facts: dict[str, Any], steps: int) -> tuple[bool, ...]:
    first = {d["step"]: d["kind"] == "full" for d in reversed(facts["decisions"])}
    return tuple(first.get(i, True) for i in range(steps))


def _guess(goal: Goal, replay: Replay, replayed: GateReplay, own: float) -> float:
    """The threshold whose replay comes nearest to the goal; the node's own where nothing was replayed."""
    masks = {t: mask for t, mask in replayed.masks().items() if not all(mask)}
    if not masks:
        return own
    if goal.error is None:
        return min(masks, key=lambda t: abs(math.log(replay.n / sum(masks[t]) / goal.speedup)))
    wanted = math.log(goal.error)
    return min(masks, key=lambda t: abs(math.log(max(replay.estimate(masks[t]), 1e-12)) - wanted))


def _profile(model: Any, job: Job, knob: str, chosen: Tried, asked: Asked) -> Profile:
    feature, found = chosen.feature, chosen.found
    inputs = dict(
        feature.given
    )  # all that the node computes by, so that the profile holds on another node's widgets too
    if knob == "threshold":
        inputs["threshold"] = chosen.setting
    else:
        assert feature.schedule is not None
        inputs["schedule"] = json.loads(feature.schedule.to_json())
    facts = {
        "error": round(found.error, 6),
        "spread": None if math.isnan(found.spread) else round(found.spread, 4),
        "evaluations": [found.full, found.total],
        "seeds": len(found.runs),
        "wanted_error": asked.goal.error,
        "wanted_speedup": asked.goal.speedup if asked.goal.error is None else None,
    }
    model_print = fingerprint(model)
    return Profile(feature.name, inputs, model_print, sampler_name(job.sampler), len(job.sigmas) - 1, facts)


def _setting(knob: str, tried: Tried) -> str:
    if knob == "threshold":
        return f"threshold {tried.setting:.4g}"
    return "schedule " + "".join("█" if computed else "·" for computed in tried.setting)


def _told(found: Measured) -> str:
    spread = "" if math.isnan(found.spread) else f" ± {found.error * found.spread:.2g}"
    return f"{found.full:g} of {found.total:g} evaluations computed, error {found.error:.4g}{spread}"


def _lines(asked: Asked, knob: str, chosen: Tried, tried: list[Tried]) -> list[str]:
    goal, found = asked.goal, chosen.found
    wanted = f"error {goal.error:g}" if goal.error is not None else f"speed-up {goal.speedup:g}"
    lines = [f"{chosen.feature.name}: {_setting(knob, chosen)}", f"wanted {wanted}: {_told(found)}"]
    if abs(goal.off(found)) > math.log1p(goal.tolerance):
        lines.append(f"Nothing that was run meets the {wanted} within {goal.tolerance:.0%}; this comes nearest.")
    elif not goal.steady(found):
        lines.append(
            f"The error of a run varies by {found.spread:.0%} between seeds: single runs will miss the wanted error by "
            "more than the tolerance. A larger batch, or a smaller wanted error, is steadier."
        )
    seeds = len(found.runs)
    lines.append(f"± is what a run differs by between seeds, from {found.errors.size} pictures of {seeds} seeds.")
    lines.append("Tried:")
    return lines + [f"{_setting(knob, t)}: {_told(t.found)}" for t in tried]
