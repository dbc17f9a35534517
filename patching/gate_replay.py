"""What a cache's gate would decide at other thresholds, from one plain run: what it looks at is recorded, thinned, and
shown again to gates of those thresholds."""

import dataclasses
import functools
import logging
from typing import Any

import torch

from ..methods.cache.cadence import Cadence
from ..methods.cache.gate import Gate, MakeGate, Seen
from .cache import CacheFeature
from .run import Run

log = logging.getLogger("tessera")
KEPT = 1 << 18  # numbers of each tensor that a gate looks at
LOW, HIGH, STEPS = 1e-4, 4.0, 64  # thresholds that are replayed
THRESHOLD = "threshold"


def threshold_of(feature: CacheFeature) -> float | None:
    """The threshold that decides for this cache; None where none does."""
    for owner in (feature, feature.gate):
        found = (
            owner.keywords.get(THRESHOLD) if isinstance(owner, functools.partial) else getattr(owner, THRESHOLD, None)
        )
        if isinstance(found, int | float) and not isinstance(found, bool):
            return float(found)
    return None


def with_threshold(feature: CacheFeature, value: float) -> CacheFeature:
    """The same cache at another threshold, which its own field, its gate's or a partial's keyword holds."""
    if any(field.name == THRESHOLD for field in dataclasses.fields(feature)):
        return dataclasses.replace(feature, **{THRESHOLD: value})
    gate: Any = feature.gate
    if isinstance(gate, functools.partial):
        gate = functools.partial(gate.func, *gate.args, **{**gate.keywords, THRESHOLD: value})
    else:
        gate = dataclasses.replace(gate, **{THRESHOLD: value})
    return dataclasses.replace(feature, gate=gate)


def ladder() -> list[float]:
    return [LOW * (HIGH / LOW) ** (i / (STEPS - 1)) for i in range(STEPS)]


@dataclasses.dataclass
class Look:
    """One evaluation as a gate met it."""

    seen: Seen
    made: torch.Tensor | None = None


class Watcher(Gate):
    """Computes everything and notes what there was to see."""

    def __init__(self, looks: list[Look]):
        self.looks = looks

    def computes(self, seen: Seen, forced: bool) -> bool:
        modulated = seen.modulated()
        kept = None if modulated is None else _thin(modulated)
        now = _thin(seen.now)
        before = now if seen.before is seen.now else _thin(seen.before)
        self.looks.append(Look(dataclasses.replace(seen, before=before, now=now, modulated=lambda: kept)))
        return True

    def computed(self, seen: Seen, made: torch.Tensor) -> None:
        self.looks[-1].made = _thin(made)


class GateReplay:
    """In the place of a cache's gate for one plain run; afterwards it answers for every threshold of the ladder."""

    def __init__(self, feature: CacheFeature):
        self.feature = feature
        self.looks: list[Look] = []
        self.makes: dict[float, MakeGate | None] = {}
        self.steps = 0
        self.window = (0.0, 0.0)

    def recording(self) -> CacheFeature:
        return dataclasses.replace(self.feature, gate=self, schedule=None, profile=None)

    def __call__(self, run: Run) -> MakeGate:
        self.looks.clear()
        self.steps = run.clock.steps
        start, end = (run.percent_to_sigma(p) for p in self.feature.percents)
        self.window = start, end
        for value in ladder():
            setup = with_threshold(self.feature, value).gate
            self.makes[value] = None if setup is None else setup(run)
        looks = [self.looks]  # of further context windows nothing is kept
        return lambda: Watcher(looks.pop() if looks else [])

    def mask(self, value: float) -> tuple[bool, ...]:
        """Whether the first evaluation of each step would be computed."""
        make = self.makes[value]
        feature = self.feature
        cadence = Cadence(feature.interval, feature.warmup, feature.tail_full, feature.multi_eval, self.window)
        computed = [True] * self.steps
        if make is None:
            return tuple(computed)
        gate, last, met = make(), None, set()
        for look in self.looks:
            seen = look.seen
            forced = cadence.computes(seen.step, seen.evaluation, self.steps, last, sigma=seen.sigma)
            full = gate.computes(seen, forced)
            if full:
                last = cadence.unit(seen.step, seen.evaluation)
                if look.made is not None:
                    gate.computed(seen, look.made)
            if seen.step not in met:
                met.add(seen.step)
                computed[seen.step] = full
        return tuple(computed)

    def masks(self) -> dict[float, tuple[bool, ...]]:
        """By threshold; empty, and said so, where what was thinned is not enough for this gate."""
        try:
            return {value: self.mask(value) for value in self.makes}
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            log.warning("Solve Threshold: %s cannot be replayed (%s); real runs alone tell.", self.feature.name, error)
            return {}


def _thin(x: Any) -> Any:
    """A copy of evenly spaced tokens of [b, N, D], or of numbers of any other tensor."""
    if not torch.is_tensor(x):
        return x
    part = -(-x.numel() // KEPT)
    return (x[:, ::part] if x.ndim == 3 else x.reshape(x.shape[0], -1)[:, ::part]).detach().clone()
