"""What a cache node knows during one run: histories by stream, and what it decided at each evaluation."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..methods.cache.cadence import Cadence
from ..methods.cache.control import Control, control_of
from ..methods.cache.taylor import Forecast
from .forward import Forward
from .run import Run

UNUSED = 2  # evaluations after which a stream that did not come back is forgotten: context windows may move every step


@dataclass
class CacheState:
    """One run of one cache node."""

    cadence: Cadence
    forecast: Callable[[], Forecast]  # makes an empty history
    variable: str  # "step" or "sigma"
    schedule: list[bool] | None
    histories: dict[Any, Forecast] = field(default_factory=dict)
    used: dict[Any, int] = field(default_factory=dict)  # evaluation at which each history was last asked or told
    shapes: dict[Any, Any] = field(default_factory=dict)  # what the text streams of a stored entry looked like
    controls: dict[Any, Control] = field(default_factory=dict)  # what a ControlNet did in a stream's newest call
    stochastic: bool = False
    skipping: dict[int, bool] = field(default_factory=dict)  # by forward, while it lasts
    decision: tuple[int, bool] = (-1, True)  # evaluation, computes
    restarts: int = 0
    first: int = 0  # evaluation at which the newest restart began
    last_full: int | None = None
    decisions: list[dict[str, Any]] = field(default_factory=list)
    blocks_computed: int = 0
    blocks_skipped: int = 0
    peak_bytes: int = 0

    def computes(self, run: Run) -> bool:
        """The decision of this evaluation, made once and shared by all its calls."""
        clock = run.clock
        if self.decision[0] == clock.evaluation:
            return self.decision[1]
        if clock.restarts != self.restarts:
            self.restarts, self.first, self.last_full = clock.restarts, clock.evaluation, None
            self.histories.clear()
        self._forget(clock.evaluation - UNUSED * clock.evaluations_a_step)
        number = clock.evaluation - self.first
        full = self.cadence.computes(
            clock.step, number, clock.steps, self.last_full, sigma=clock.sigma, schedule=self.schedule
        )
        if full:
            self.last_full = self.cadence.unit(clock.step, number)
        self.decision = (clock.evaluation, full)
        self.decisions.append({"step": clock.step, "sigma": round(clock.sigma, 6), "kind": "full"})
        return full

    def _forget(self, before: int) -> None:
        for key in [k for k, at in self.used.items() if at < before]:
            for kept in (self.used, self.histories, self.shapes):
                kept.pop(key, None)

    def keeps_control(self, forward: Forward) -> bool:
        """Whether the ControlNet acts on every stream of this call as on its last one; takes note of it."""
        now = control_of(forward.control)
        same = all(self.controls.get(key, now).like(now) for key in forward.keys)
        self.controls.update(dict.fromkeys(forward.keys, now))
        return same

    def x(self, run: Run) -> float:
        return run.clock.position if self.variable == "step" else run.clock.sigma

    def ready(self, run: Run, keys) -> bool:
        series = run.clock.series
        return all((k, series) in self.histories and self.histories[k, series].serves(self.x(run)) for k in keys)

    def store(self, run: Run, key, feature: torch.Tensor) -> None:
        key = key, run.clock.series
        if key not in self.histories:
            self.histories[key] = self.forecast()
        self.used[key] = run.clock.evaluation
        self.histories[key].update(feature, self.x(run))
        self.peak_bytes = max(self.peak_bytes, sum(h.bytes_held for h in self.histories.values()))

    def predict(self, run: Run, key) -> torch.Tensor:
        key = key, run.clock.series
        self.used[key] = run.clock.evaluation
        return self.histories[key].predict(self.x(run))

    def mark_forecast(self) -> None:
        self.decisions[-1]["kind"] = "forecast"
