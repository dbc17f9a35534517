"""What a cache node knows during one run: histories by stream, and what it decided at each evaluation."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..methods.cache.cadence import Cadence
from ..methods.cache.control import Control, control_of
from ..methods.cache.gate import Gate, MakeGate, Seen
from .evaluations import Evaluations
from .forward import Forward
from .run import Run

UNUSED = 2  # evaluations after which a stream that did not come back is forgotten: context windows may move every step
Window = tuple[int, ...] | None


@dataclass
class Lane:
    """The decisions for one context window; the only one of a run without windows."""

    gates: dict[int, Gate] = field(default_factory=dict)  # by series of evaluations
    last_full: int | None = None
    decided: int = -1  # evaluation of the newest decision
    step: int = -1
    full: bool = True
    seen: Seen | None = None  # of that evaluation, if it is computed, until its first call is over


@dataclass
class CacheState(Evaluations):
    """One run of one cache node."""

    cadence: Cadence
    forecast: Callable[[], Any]  # makes an empty history
    variable: str  # "step" or "sigma"
    schedule: list[bool] | None
    gate: MakeGate | None = None
    kind: str = "forecast"  # what a skipped evaluation is called
    histories: dict[Any, Any] = field(default_factory=dict)
    used: dict[Any, int] = field(default_factory=dict)  # evaluation at which each history was last asked or told
    shapes: dict[Any, Any] = field(default_factory=dict)  # what the text streams of a stored entry looked like
    controls: dict[Any, Control] = field(default_factory=dict)  # what a ControlNet did in a stream's newest call
    lanes: dict[Window, Lane] = field(default_factory=dict)
    stochastic: bool = False
    calls: dict[int, Any] = field(default_factory=dict)  # by forward, while it lasts: what its level remembers
    any_computed: bool = False  # of its calls
    first: int = 0  # evaluation at which the newest restart began
    blocks_computed: int = 0
    blocks_skipped: int = 0
    peak_bytes: int = 0

    def computes(self, forward: Forward, look: Callable[[Seen], Seen] | None = None) -> bool:
        """The decision of this evaluation, made once for each context window and shared by all its calls.

        look: adds to a Seen what this level of the model can show to a gate."""
        run = forward.run
        clock = run.clock
        self._open(run)
        lane = self.lanes.setdefault(forward.keys[0].window, Lane())
        if lane.decided == clock.evaluation:
            return lane.full
        number = clock.evaluation - self.first
        whole = self.cadence.multi_eval == "skip_whole_steps"
        again = whole and lane.step == clock.step and lane.decided >= self.first
        forced = self.cadence.computes(
            clock.step, number, clock.steps, lane.last_full, sigma=clock.sigma, schedule=self.schedule
        )
        full = forced
        if self.gate is not None and self.schedule is None:
            gate = lane.gates.setdefault(clock.series, self.gate())
            seen = Seen(clock.step, number, self.x(run), clock.sigma)
            seen = look(seen) if look is not None else seen
            full = gate.computes(seen, forced or (again and lane.full))
            lane.seen = seen if full else None
            self.measure()
            if gate.error is not None:
                worst = max(gate.error, self.decisions[-1].get("error", 0.0))
                self.decisions[-1]["error"] = round(worst, 6)
        if again:
            full = lane.full
        if full:
            lane.last_full = self.cadence.unit(clock.step, number)
        lane.decided, lane.step, lane.full = clock.evaluation, clock.step, full
        return full

    def tell(self, forward: Forward, made: torch.Tensor) -> None:
        """To the gate: what a computed evaluation's first call gave for its first stream [b, ...]."""
        lane = self.lanes[forward.keys[0].window]
        if self.gate is not None and lane.seen is not None:
            lane.gates[forward.run.clock.series].computed(lane.seen, made)
            lane.seen = None

    def _open(self, run: Run) -> None:
        """The entry of a new evaluation."""
        if self.begins(run):
            self._forget(self.evaluation - UNUSED * run.clock.evaluations_a_step)
            self.any_computed = False

    def restarted(self, run: Run) -> None:
        self.first = run.clock.evaluation
        self.histories.clear()
        self.lanes.clear()

    def _forget(self, before: int) -> None:
        for key in [k for k, at in self.used.items() if at < before]:
            for kept in (self.used, self.histories, self.shapes):
                kept.pop(key, None)
        for window in [w for w, lane in self.lanes.items() if lane.decided < before]:
            del self.lanes[window]

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

    def fits(self, run: Run, keys, shape: Any) -> bool:
        """Whether the streams [...] of a call look as they did when these histories were told; if not, they start anew."""
        places = [(key, run.clock.series) for key in keys]
        same = all(self.shapes.get(place) == shape for place in places)
        for place in places:
            if self.shapes.get(place, shape) != shape:
                self.histories.pop(place, None)
            self.shapes[place] = shape
        return same

    def store(self, run: Run, key, feature: torch.Tensor, measured: bool = True) -> None:
        """measured: count what is held; many stores in a row count once, by `measure`."""
        key = key, run.clock.series
        if key not in self.histories:
            self.histories[key] = self.forecast()
        self.used[key] = run.clock.evaluation
        self.histories[key].update(feature, self.x(run))
        if measured:
            self.measure()

    def measure(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.bytes_held)

    @property
    def bytes_held(self) -> int:
        """Bytes of all histories and of what the gates keep."""
        gates = sum(gate.bytes_held for lane in self.lanes.values() for gate in lane.gates.values())
        return gates + sum(history.bytes_held for history in self.histories.values())

    def predict(self, run: Run, key) -> torch.Tensor:
        key = key, run.clock.series
        self.used[key] = run.clock.evaluation
        return self.histories[key].predict(self.x(run))

    def mark(self, skipped: bool) -> None:
        """What came of one call. An evaluation of which any call was computed (another context window, a prompt that is
        met first) is told as computed."""
        self.any_computed |= not skipped
        self.decisions[-1]["kind"] = "full" if self.any_computed else self.kind
