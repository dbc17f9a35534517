"""A cache of attention outputs (Pyramid Attention Broadcast, arXiv 2408.12588): each kind of attention is computed at one
evaluation in so many and its output is used again in between. Blocks run as ever, and so do the projections to q, k and v:
what is saved is attention itself, by whatever method computes it."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .attention_around import AroundAttention
from .blocks import BlockPosition, positions
from .cache import CacheFeature
from .cache_state import CacheState
from .forward import Forward
from .memory import stream_elements
from .run import Run

GROUP = {"self": "self", "joint": "self", "cross": "cross"}  # calls of other kinds are computed


@dataclass
class Broadcasts:
    """One run. groups: decisions and outputs of each group of calls; the first one also tells of the run."""

    groups: dict[str, CacheState]
    decisions: list[dict[str, Any]] = field(default_factory=list)
    evaluation: int = -1  # of the newest entry of decisions
    forward: Forward | None = None  # the newest call of the model, and whether a ControlNet asks that it be computed
    held_back: bool = False
    computed: int = 0
    reused: int = 0
    peak_bytes: int = 0


@dataclass(frozen=True, eq=False)
class AttentionCache(AroundAttention, CacheFeature):
    """interval: of self-attention, and of image and text in one sequence; cross_interval: of attention to the text."""

    policy: str = "PAB"
    cross_interval: int = 6

    @property
    def off(self) -> bool:
        return self.interval < 2 and self.cross_interval < 2 and not self.schedule

    def begin(self, run: Run) -> Any:
        base: CacheState = super().begin(run)
        each = {"self": self.interval, "cross": self.cross_interval}
        groups = {
            name: replace(base, cadence=replace(base.cadence, interval=n), **_empty()) for name, n in each.items()
        }
        return Broadcasts(groups)

    def check_arch(self, arch, class_name: str) -> None:
        if arch is None:
            self.cannot(f"{self.name}: policy PAB does not know the attention of {class_name}. Use policy FORA.")
        elif "attention" in arch.limits:
            self.cannot(f"{self.name}: policy PAB cannot act here: {arch.limits['attention']} Use policy FORA.")
        elif not (arch.override or arch.reached):
            self.cannot(
                f"{self.name}: policy PAB cannot reach the attention of {arch.name}, which does not call ComfyUI's "
                "override. Use policy FORA."
            )

    def held_bytes(self, run: Run, noise_shape: tuple[int, ...], conds: dict[str, Any]) -> int:
        if run.arch is None:
            return 0
        each = {"self": self.interval, "cross": self.cross_interval}
        stack = positions(run.arch, run.network)
        calls = sum(each.get(GROUP.get(kind, ""), 1) > 1 for block in stack for kind in block.spec.calls)
        return calls * self.held(run, stream_elements(run, noise_shape, conds))

    def around_call(
        self, state: Broadcasts, forward: Forward, block: BlockPosition, nth: int, q: torch.Tensor, proceed
    ) -> torch.Tensor:
        kinds = block.spec.calls
        group = state.groups.get(GROUP.get(kinds[nth % len(kinds)] if kinds else "other", ""))
        self._note(state, forward)
        if group is None or (group.cadence.interval < 2 and not self.schedule):
            state.computed += 1
            return proceed()
        run = forward.run
        full = group.computes(forward) | state.held_back
        keys = [(key, block.number, nth) for key in forward.keys]
        if q.shape[0] % len(keys):
            keys = [(forward.keys, block.number, nth)]
        fits = group.fits(run, keys, tuple(q.shape[1:]))
        if fits and not full and group.ready(run, keys):
            state.decisions[-1]["kind"] = "reuse"
            state.reused += 1
            rows = [group.predict(run, key) for key in keys]
            return rows[0] if len(rows) == 1 else torch.cat(rows)
        state.computed += 1
        out = proceed()
        for key, rows in zip(keys, out.chunk(len(keys)), strict=True):
            group.store(run, key, rows)
        state.peak_bytes = max(state.peak_bytes, sum(g.bytes_held for g in state.groups.values()))
        return out

    def _note(self, state: Broadcasts, forward: Forward) -> None:
        """What is asked once a call of the model, and the entry of a new evaluation."""
        clock = forward.run.clock
        if state.forward is not forward:
            state.forward = forward
            state.held_back = self.held_back(next(iter(state.groups.values())), forward)
        if state.evaluation != clock.evaluation:
            state.evaluation = clock.evaluation
            state.decisions.append({"step": clock.step, "sigma": round(clock.sigma, 6), "kind": "full"})

    def facts(self, state: Broadcasts) -> dict[str, Any]:
        first = replace(next(iter(state.groups.values())), decisions=state.decisions, peak_bytes=state.peak_bytes)
        return {
            **super().facts(first),
            "policy": self.policy,
            "attention_computed": state.computed,
            "attention_reused": state.reused,
        }

    def line(self, facts: dict[str, Any]) -> str:
        if not facts or self.inactive:
            return self.inactive
        total = facts["attention_computed"] + facts["attention_reused"]
        held = f"held {facts['peak_bytes'] / 2**20:.1f} MiB"
        return f"{self.policy}: reused {facts['attention_reused']} of {total} attention outputs, {held}"


def _empty() -> dict[str, Any]:
    """What two groups of one run must not share."""
    return {"histories": {}, "used": {}, "shapes": {}, "controls": {}, "lanes": {}, "calls": {}, "decisions": []}
