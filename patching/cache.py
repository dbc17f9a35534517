"""What every cache node is: a rule that says which evaluations are computed, and a fill for the others. It acts in place
of the block stack (cache_blocks.py) or in place of the whole model (cache_output.py)."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..methods.cache.cadence import Cadence
from ..methods.cache.gate import MakeGate
from ..methods.cache.profile import Profile
from ..methods.cache.schedule import Schedule
from ..methods.cache.taylor import Forecast
from .cache_state import CacheState
from .forward import Forward
from .profiles import check_profile
from .run import Feature, Run

log = logging.getLogger("tessera")
ROUGH = "adds new noise at its steps, where forecasts are rough: compare, or compute more evaluations"
DOUBLED = (
    "{} and core's EasyCache or LazyCache are on the same MODEL, and each would skip on top of the other's skipped steps. "
    "Remove one of them, or use them on different samplers."
)
EASYCACHE = "easycache"  # where core's EasyCache and LazyCache keep their state
FOREVER = 1 << 30  # as an interval: no cadence, the gate alone decides


@dataclass(frozen=True, eq=False)
class CacheFeature(Feature):
    """Settings of one cache node, for any level.

    gate:     makes the gate of a run; None: the cadence of `interval` alone decides.
    interval: with a gate, the most evaluations from one computed one to the next.
    residual: what is stored is the output minus the input of what is skipped, and is added to the new input.
    fill:     makes an empty history from the options of `history`; None: Taylor forecasts.
    profile:  where settings came from; it must have been made for this model, sampler and number of steps.
    given:    the node's widgets, for a profile of them.
    copies:   stored outputs beside the fill's own, for the memory estimate.
    """

    skips: ClassVar[bool] = True
    name: str = "Taylor Cache"
    interval: int = 3
    order: int = 1
    warmup: int = 3
    tail_full: int = 1
    basis: str = "taylor_paper"
    variable: str = "auto"
    percents: tuple[float, float] = (0.0, 1.0)
    cache_device: str = "gpu"
    cache_dtype: str = "model"
    multi_eval: str = "count_each"
    cache_with_control: bool = True
    schedule: Schedule | None = None
    profile: Profile | None = None
    gate: Callable[[Run], MakeGate | None] | None = None
    first_blocks: int = 0
    last_blocks: int = 0
    residual: bool = False
    fill: Callable[..., Any] | None = None
    copies: int = 0
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def off(self) -> bool:
        """Whether it can never skip: it then stores nothing."""
        return self.interval < 2 and not self.schedule

    def begin(self, run: Run) -> CacheState:
        check_profile(self, run)
        start, end = (run.percent_to_sigma(p) for p in self.percents)
        whole = "skip_whole_steps" if run.clock.returns else self.multi_eval  # such a step's calls hang together
        cadence = Cadence(self.interval, self.warmup, self.tail_full, whole, (start, end))
        if run.stochastic and not self.off:
            log.warning("%s: %s %s.", self.name, run.sampler.removeprefix("sample_"), ROUGH)
        return CacheState(
            cadence,
            self.history(run),
            self.variable_of(run),
            self._scheduled(run) if self.schedule else None,
            gate=self.gate(run) if self.gate is not None and not self.off else None,
            stochastic=run.stochastic,
            kind="reuse" if self.residual or self.order == 0 else "forecast",
        )

    def _scheduled(self, run: Run) -> list[bool]:
        """The schedule's decisions. ValueError where it was made for other noise levels than this model has."""
        assert self.schedule is not None
        sigmas = run.clock.sigmas[:-1] or run.clock.sigmas
        most, first = float(run.sampling.sigma_max), self.schedule.sigmas[0]
        falls = sigmas[0] >= sigmas[-1]
        if falls and (first > 1.01 * most or sigmas[0] > 1.01 * first):
            raise ValueError(
                f"{self.name} was given a schedule that starts at sigma {first:.4g}, and this run starts at {sigmas[0]:.4g} "
                f"on a model of up to {most:.4g}. Make the schedule with this model and at least this much denoise."
            )
        return self.schedule.for_run(sigmas)

    def variable_of(self, run: Run) -> str:
        """What forecasts extrapolate over in this run: "step" or "sigma". auto is the step: on both digit models it lost
        less at every interval, under flow shifts of 8 (docs/cache_quality.md), whatever ideal flows suggest."""
        return "step" if self.variable == "auto" else self.variable

    def history(self, run: Run, order: int | None = None) -> Callable[[], Any]:
        """What makes an empty history of one stream."""
        variable = self.variable_of(run)
        rising = variable == "step" or (len(run.clock.sigmas) > 1 and run.clock.sigmas[0] < run.clock.sigmas[-1])
        scale = float(run.clock.steps) if variable == "step" else max(map(abs, run.clock.sigmas))
        options = {
            "order": self.order if order is None else order,
            "basis": self.basis,
            "direction": 1 if rising else -1,
            "scale": scale or 1.0,
            "cache_dtype": None if self.cache_dtype == "model" else getattr(torch, self.cache_dtype),
            "cache_device": None if self.cache_device == "gpu" else self.cache_device,
        }
        return lambda: (self.fill or Forecast)(**options)

    def plan(self) -> str:
        if self.off:
            return "computes every evaluation: nothing is skipped"
        how = "reuses" if self.residual or self.order == 0 else f"forecasts with order {self.order}"
        policy = getattr(self, "policy", "")
        when = f"one of {self.interval} is computed" if self.gate is None else "its gate decides"
        if self.gate is not None and self.interval < FOREVER:
            when += f", at most {self.interval - 1} skipped in a row"
        if self.schedule:
            when = f"a schedule has {self.schedule.full} of {len(self.schedule.mask)} steps computed"
        ends = f"the first {self.warmup} and the last {self.tail_full} evaluations are always computed"
        return f"{policy}{': ' * bool(policy)}{how} what it skips; {when}; {ends}"

    def conflicts(self, other: Feature) -> str | None:
        if isinstance(other, CacheFeature):
            return (
                f"{self.name} found a {other.name} on this MODEL already: two caches would forecast from each other's "
                "forecasts. Remove one of them."
            )
        return None

    def refuses(self, transformer_options: dict[str, Any]) -> str | None:
        if EASYCACHE in transformer_options and not self.off:
            return DOUBLED.format(self.name)
        return None

    def held_back(self, state: CacheState, forward: Forward) -> bool:
        """Whether a ControlNet asks for this call to be computed."""
        same = state.keeps_control(forward)
        return not same or (forward.control is not None and not self.cache_with_control)

    def held(self, run: Run, elements: int) -> int:
        """Bytes of order + 1 stored outputs of so many elements in every series of evaluations."""
        return self.needed(run, elements) if self.cache_device == "gpu" else 0

    def needed(self, run: Run, elements: int) -> int:
        """The same, wherever they are held."""
        if self.off:
            return 0
        own = run.dtype
        size = (own if self.cache_dtype == "model" else getattr(torch, self.cache_dtype)).itemsize
        series = run.clock.evaluations_a_step if run.clock.returns else 1
        return (self.order + 1 + self.copies) * series * elements * size

    def facts(self, state: CacheState) -> dict[str, Any]:
        kinds = [d["kind"] for d in state.decisions]
        gates = [gate for lane in state.lanes.values() for gate in lane.gates.values()]
        return {
            **{name: fact for gate in gates for name, fact in gate.facts.items()},
            "restarts": state.restarts,
            "stochastic": state.stochastic,
            "decisions": state.decisions,
            "full": kinds.count("full"),
            "forecast": len(kinds) - kinds.count("full"),
            "blocks_computed": state.blocks_computed,
            "blocks_skipped": state.blocks_skipped,
            "peak_bytes": state.peak_bytes,
        }

    def line(self, facts: dict[str, Any]) -> str:
        if not facts or self.inactive:
            return self.inactive
        total = facts["full"] + facts["forecast"]
        verb = "reused" if self.residual or self.order == 0 else "forecast"
        line = f"{verb} {facts['forecast']} of {total} evaluations, held {facts['peak_bytes'] / 2**20:.1f} MiB"
        if facts["restarts"] > 1 and not facts["forecast"]:
            return f"{line}; this sampler goes back to noisier steps {facts['restarts']} times, and each starts anew"
        return f"{line}; the sampler {ROUGH}" if facts["stochastic"] and facts["forecast"] else line
