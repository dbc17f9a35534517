"""Accelerate: the first run on a MODEL tries stacks of accelerators on the sampler's own job and keeps the best; later
runs apply what was found. Trials are whole sampling runs of the user's guider, with its prompts, noise and schedule."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .. import archs
from ..methods.measure import stack_files
from ..methods.measure.stack_files import StackProfile
from ..methods.measure.stack_search import Goal, Stack, Tried, best, front, search
from . import stacks
from .compose import joins
from .memory import grid_of
from .report import tell
from .run import ChoosingFeature, Feature, run_once
from .sizes import fingerprint
from .trials import Trials

log = logging.getLogger("tessera")
CONFIRMING = 2  # runs of the budget that are kept for measuring the choice and the plain MODEL once more
OTHER_MODEL = (
    "Accelerate was given {name}, which was made for another model ({architecture}). Choose the profile of this model, or "
    "measure."
)
ANY_GRID, ANY_STEPS = (1, 64, 64), 20  # a plan does not know the run: tokens and steps at which every kind is tried
TRIED = {"cache": "caches", "attention": "sparse attention"}
SHORTEST = 4  # trials: plain, one stack, and both again


@dataclass(frozen=True, eq=False)
class Chosen(Feature):
    """What Accelerate decided for one run, for its report and its line."""

    name: str = "Accelerate"
    told: dict[str, Any] = field(default_factory=dict)

    def facts(self, state: Any) -> dict[str, Any]:
        return self.told

    def begin(self, run: Any) -> dict[str, Any]:
        return self.told

    def line(self, facts: dict[str, Any]) -> str:
        if not facts:
            return ""
        runs = f"{facts['trials']} trial run{'s' if facts['trials'] != 1 else ''}"
        how = runs if facts["trials"] else f"profile {facts['profile']}"
        note = f"; {facts['note']}" if facts.get("note") else ""
        if not facts["stack"] and len(facts["front"]) < 2 and not note:
            return f"plain: {stacks.NOTHING} ({how})"
        if not facts["stack"]:
            return f"plain: no stack was faster within the goal ({how}){note}"
        found = f"{facts['speedup']:.2f}× faster at {facts['judged']} SSIM {facts['similarity']:.3f}"
        return f"{found}: {facts['chosen']} ({how}){note}"


@dataclass(frozen=True, eq=False)
class Accelerate(ChoosingFeature):
    """packed: the same model with packed weights, to be tried in place of this one. profile: is applied without a trial.
    folder, file: where what is found is written, and looked for before anything is tried unless `again`; an empty name is
    made of the model, the sampler and the steps."""

    name: str = "Accelerate"
    goal: Goal = Goal(loss=0.1)
    trials: int = 12
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None
    packed: Any = None
    profile: tuple[str, StackProfile] | None = None
    folder: Path = Path()
    file: str = ""
    again: bool = False

    def conflicts(self, other: Feature) -> str | None:
        if isinstance(other, Accelerate):
            return "Accelerate is on this MODEL already: one chooses for the whole MODEL. Remove one of them."
        return None

    def plan(self) -> str:
        wanted = (f"the fastest stack with an SSIM of {1 - self.goal.loss:g} or more" if self.goal.loss is not None
                  else f"the stack nearest to the plain result that is {self.goal.ratio:g}× faster")  # fmt: skip
        if self.profile is not None:
            name, profile = self.profile
            made = f"made for {profile.steps} steps of {profile.sampler.removeprefix('sample_')}"
            return f"applies {profile.name}, of profile {name} ({made}), without a trial"
        if self.trials < SHORTEST:
            return f"applies {wanted} that was found before for this model, sampler and steps; tries nothing"
        attention = f"sparse attention (from {stacks.FEWEST_TOKENS:,} image tokens on)"
        tried = f"caches, {attention} and packed weights" if self.packed is not None else f"caches and {attention}"
        found = "" if self.again else "uses what it found before for this model, sampler and steps; else "
        return f"{found}tries {tried} in up to {self.trials} whole runs, and keeps {wanted}"

    def foreseen(self, others: tuple[Feature, ...], model: Any) -> tuple[list[str], list[str]]:
        arch, refused, declined = archs.find(model.get_model_object("diffusion_model")), [], []
        if self.profile is None:
            if arch is None:
                declined.append(f"{self.name} tries no attention: where this model's image tokens lie is not known")
            several = stacks.ladders(ANY_GRID if arch is not None else None, ANY_STEPS, arch is not None, False)
            for kind, ladders in several.items():
                kept, why = stacks.served(ladders, others, model)
                how = f"tries fewer {TRIED[kind]}" if kept else f"will try no {TRIED[kind]}"
                declined += [f"{self.name} {how}: {sentence}" for sentence in dict.fromkeys(why)]
            return declined, []
        name, profile = self.profile
        if profile.model != fingerprint(model):
            refused.append(OTHER_MODEL.format(name=name, architecture=profile.architecture))
        try:
            for feature in stacks.features_of_stack(profile.stack, None):
                joins(others, feature, model)
        except ValueError as sentence:
            refused.append(str(sentence))
        return [], refused

    def choose(self, executor, features, args, kwargs):
        job = Trials(executor, tuple(f for f in features if f is not self), args, kwargs, self.decode, self.packed)
        ladders, declined = self._offered(job)
        name, profile, note = self._known(job, declined)
        if profile is None:
            profile = self._profile(job, self._measure(job, ladders), declined)
            self._save(name, profile)
            note = "; ".join(declined)
        return self._apply(job, executor, features, args, kwargs, (name, profile, note, job.done))

    def _known(self, job: Trials, declined: list[str]) -> tuple[str, StackProfile | None, str]:
        """(file name, the profile that applies, what it differs in); None: it has to be measured."""
        model, steps = fingerprint(job.patcher), job.steps
        if self.profile is not None:
            name, profile = self.profile
            if profile.model != model:
                raise ValueError(OTHER_MODEL.format(name=name, architecture=profile.architecture))
            if "weights" in profile.stack and self.packed is None:
                raise ValueError(
                    f"Accelerate was given {name}, which uses packed weights. Connect packed_model, or measure."
                )
            misfit = profile.misfit(model, job.sampler, steps)
            made = [f"made for the {misfit}"] if misfit else []
            return name, profile, "; ".join(made + profile.apart([*job.shape], beside(job)))
        goal = "".join(f"{kind}{value:g}" for kind, value in self.asked.items())
        parts = (job.architecture, job.sampler.removeprefix("sample_"), steps, goal, model[:6])
        name = self.file or stack_files.file_name(*parts)
        if self.again:
            return name, None, ""
        try:
            profile = stack_files.load(self.folder, name)
            stacks.features_of_stack(profile.stack, None)
        except ValueError:
            return name, None, ""
        now = (self.asked, job.judged, self.packed is not None, declined)
        same = now == (profile.goal, profile.judged, profile.packed, profile.declined)
        fits = same and not profile.misfit(model, job.sampler, steps)
        return name, profile if fits else None, "; ".join(declined + profile.apart([*job.shape], beside(job)))

    @property
    def asked(self) -> dict[str, float]:
        """The goal as a profile says it."""
        if self.goal.loss is not None:
            return {"ssim": round(1 - self.goal.loss, 6)}
        return {"speedup": float(self.goal.ratio or 0)}

    def _offered(self, job: Trials) -> tuple[dict[str, Any], list[str]]:
        """(the ladders that can act here, why others cannot)."""
        ladders, declined = {}, []
        grid = grid_of(job, job.shape) if job.arch is not None else None
        present = job.others if self.packed is None else (*job.others, *job.side(True)[0])
        for kind, several in stacks.ladders(grid, job.steps, job.arch is not None, self.packed is not None).items():
            kept, why = stacks.served(several, present, job.patcher)
            declined += [reason for reason in dict.fromkeys(why) if reason not in declined]
            if kept:
                ladders[kind] = kept
        return ladders, declined

    def _measure(self, job: Trials, ladders: dict[str, Any]) -> list[Tried]:
        """The plain run and every stack that was tried."""
        if self.trials < SHORTEST:
            raise ValueError(
                f"Accelerate has no profile of this model, sampler, number of steps and goal, and {self.trials} trials are too "
                f"few to make one. Allow {SHORTEST} or more, or choose a profile."
            )
        job.begin(self.trials)
        self._tell(job, "plain", [])
        points = [job.plain()]
        walk, answer = search(self.goal, ladders), None
        while job.done < self.trials - CONFIRMING:
            try:
                stack = walk.send(answer) if answer is not None else next(walk)
            except StopIteration:
                break
            self._tell(job, stack.name, points)
            answer = job.trial(stack)
            points.append(answer)
        return self._confirmed(job, points)

    def _tell(self, job: Trials, name: str, points: list[Tried]) -> None:
        """The canvas what is tried now."""
        found = best(points, self.goal) if points else None
        so_far = "" if found is None else f"{found.stack.name}, {found.ratio:.2f}×"
        told = {"node": self.node, "trial": job.done + 1, "of": self.trials, "name": name, "best": so_far}
        tell("tessera.trial", {**told, "front": chart_points(points, found)})

    def _confirmed(self, job: Trials, points: list[Tried]) -> list[Tried]:
        """The points after the plain MODEL and the choice were measured once more: what a busy moment made look fast is
        not chosen."""
        choice = best(points, self.goal)
        if not choice.stack.parts:
            return points
        plain = min(points[0].seconds, job.seconds_of(Stack()))
        seconds = min(choice.seconds, job.seconds_of(choice.stack))
        at = points.index(choice)
        points[at] = replace(choice, seconds=seconds)
        points[0] = replace(points[0], seconds=plain)
        return [replace(p, ratio=plain / p.seconds) for p in points]

    def _profile(self, job: Trials, points: list[Tried], declined: list[str]) -> StackProfile:
        choice = best(points, self.goal)
        told = chart_points(points, choice)
        return StackProfile(
            choice.stack.parts, fingerprint(job.patcher), job.architecture, job.sampler, job.steps, list(job.shape),
            self.asked, told, job.device, job.judged, self.packed is not None, declined,
            beside(job),
        )  # fmt: skip

    def _save(self, name: str, profile: StackProfile) -> None:
        try:
            stack_files.save(self.folder, name, profile)
        except OSError as error:  # the run must not be lost with it
            log.warning("Accelerate could not write its profile %s: %s. The next run measures again.", name, error)

    def _apply(self, job: Trials, executor, features, args, kwargs, found) -> Any:
        name, profile, note, trials = found
        added, packed = stacks.features_of_stack(profile.stack, None), "weights" in profile.stack
        own, patcher = job.side(packed)
        for number, feature in enumerate(added):
            joins((*own, *added[:number]), feature, patcher)
            feature.attached(patcher)
        chosen = next((p for p in profile.points if p.get("chosen")), {"ratio": 1.0, "loss": 0.0})
        told = {
            "stack": profile.stack, "chosen": profile.name, "speedup": chosen["ratio"],
            "similarity": round(1 - chosen["loss"], 6), "judged": profile.judged, "trials": trials,
            "profile": name, "note": note, "front": profile.points, "measured_on": profile.device,
            "goal": profile.goal,
        }  # fmt: skip
        head = Chosen(self.node, told=told)
        with job.weights(packed):
            return run_once(executor, (*own, head, *added), args, kwargs, owners=features)[0]


def beside(job: Trials) -> list[str]:
    """What else stands on the MODEL, of which speed and likeness depend: other nodes of ours, and LoRA or the like."""
    return [*(f.name for f in job.others), *(["weight patches"] if job.patcher.patches else [])]


def chart_points(points: list[Tried], choice: Tried | None) -> list[dict[str, Any]]:
    """What a chart and a profile tell of each stack that was tried."""
    leading = {id(p) for p in front(points)}
    return [{"name": p.stack.name, "ratio": round(p.ratio, 4), "loss": round(p.loss, 6), "seconds": round(p.seconds, 4),
             "front": id(p) in leading, "chosen": p is choice, **p.facts} for p in points]  # fmt: skip
