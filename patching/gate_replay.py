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


@dataclasses.dataclass(frozen=True)
class AtThreshold:
    """A gate's setup, of whose gates `threshold` is another one."""

    setup: Any
    threshold: float

    def __call__(self, run: Run) -> MakeGate | None:
        make = self.setup(run)
        return None if make is None else functools.partial(_made, make, self.threshold)


def _made(make: MakeGate, threshold: float) -> Gate:
    gate = make()
    gate.threshold = threshold  # type: ignore[attr-defined]
    return gate


def with_threshold(feature: CacheFeature, value: float) -> CacheFeature:
    """The same cache at another threshold."""
    setup = feature.gate.setup if isinstance(feature.gate, AtThreshold) else feature.gate
    return dataclasses.replace(feature, gate=AtThreshold(setup, value))


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
        self.make: MakeGate | None = None
        self.steps = 0
        self.threshold: float | None = None  # the cache's own; None where its gate has none
        self.window = (0.0, 0.0)

    def recording(self) -> CacheFeature:
        return dataclasses.replace(self.feature, gate=self, schedule=None, profile=None)

    def __call__(self, run: Run) -> MakeGate:
        self.looks.clear()
        self.steps = run.clock.steps
        start, end = (run.percent_to_sigma(p) for p in self.feature.percents)
        self.window = start, end
        self.make = self.feature.gate(run) if self.feature.gate is not None else None
        self.threshold = None if self.make is None else getattr(self.make(), "threshold", None)
        looks = [self.looks]  # of further context windows nothing is kept
        return lambda: Watcher(looks.pop() if looks else [])

    def mask(self, value: float) -> tuple[bool, ...]:
        """Whether the first evaluation of each step would be computed."""
        feature = self.feature
        cadence = Cadence(feature.interval, feature.warmup, feature.tail_full, feature.multi_eval, self.window)
        computed = [True] * self.steps
        if self.make is None:
            return tuple(computed)
        gate, last, met = _made(self.make, value), None, set()
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
            return {value: self.mask(value) for value in ladder()}
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            log.warning("Solve Threshold: %s cannot be replayed (%s); real runs alone tell.", self.feature.name, error)
            return {}


def _thin(x: Any) -> Any:
    """A copy of evenly spaced tokens of [b, N, D], or of numbers of any other tensor."""
    if not torch.is_tensor(x):
        return x
    part = -(-x.numel() // KEPT)
    return (x[:, ::part] if x.ndim == 3 else x.reshape(x.shape[0], -1)[:, ::part]).detach().clone()
