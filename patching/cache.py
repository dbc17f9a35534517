"""How a cache method skips work: in place of the block stack, or in place of the whole model."""

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch

from ..methods.cache.cadence import Cadence
from ..methods.cache.taylor import Forecast
from .blocks import BlockFeature, BlockPosition, Streams, positions
from .cache_state import CacheState
from .forward import Forward, ModelFeature
from .memory import stream_elements
from .run import Feature, Run

log = logging.getLogger("tessera")
ROUGH = "adds new noise at its steps, where forecasts are rough: compare, or lower interval"
EASYCACHE = "easycache"  # where core's EasyCache and LazyCache keep their state


@dataclass(frozen=True, eq=False)
class TaylorFeature(Feature):
    """Settings of one Taylor Cache node, for either level."""

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
    schedule: tuple[bool, ...] | None = None

    def begin(self, run: Run) -> CacheState:
        start, end = (run.percent_to_sigma(p) for p in self.percents)
        whole = "skip_whole_steps" if run.clock.returns else self.multi_eval  # such a step's calls hang together
        cadence = Cadence(self.interval, self.warmup, self.tail_full, whole, (start, end))
        variable = self.variable if self.variable != "auto" else "sigma" if is_flow(run) else "step"
        rising = variable == "step" or (len(run.clock.sigmas) > 1 and run.clock.sigmas[0] < run.clock.sigmas[-1])
        scale = float(run.clock.steps) if variable == "step" else max(map(abs, run.clock.sigmas))
        options = {
            "order": self.order,
            "basis": self.basis,
            "direction": 1 if rising else -1,
            "scale": scale or 1.0,
            "cache_dtype": None if self.cache_dtype == "model" else getattr(torch, self.cache_dtype),
            "cache_device": None if self.cache_device == "gpu" else self.cache_device,
        }
        if run.stochastic and self.interval > 1:
            log.warning("%s: %s %s.", self.name, run.sampler.removeprefix("sample_"), ROUGH)
        schedule = list(self.schedule) if self.schedule else None
        return CacheState(cadence, lambda: Forecast(**options), variable, schedule, stochastic=run.stochastic)

    def conflicts(self, other: Feature) -> str | None:
        if isinstance(other, TaylorFeature):
            return (
                f"{self.name} found a {other.name} on this MODEL already: two caches would forecast from each other's "
                "forecasts. Remove one of them."
            )
        return None

    def refuses(self, transformer_options: dict[str, Any]) -> str | None:
        if EASYCACHE in transformer_options and (self.interval > 1 or self.schedule):
            return (
                f"{self.name} and core's EasyCache or LazyCache are on the same MODEL, and each would skip on top of "
                "the other's skipped steps. Remove one of them, or use them on different samplers."
            )
        return None

    def _held_back(self, state: CacheState, forward: Forward) -> bool:
        """Whether a ControlNet asks for this call to be computed."""
        same = state.keeps_control(forward)
        return not same or (forward.control is not None and not self.cache_with_control)

    def _held(self, run: Run, elements: int) -> int:
        """Bytes of order + 1 stored outputs of so many elements in every series of evaluations."""
        if self.cache_device != "gpu" or (self.interval < 2 and not self.schedule):
            return 0
        own = run.model.get_dtype_inference()
        size = (own if self.cache_dtype == "model" else getattr(torch, self.cache_dtype)).itemsize
        series = run.clock.evaluations_a_step if run.clock.returns else 1
        return (self.order + 1) * series * elements * size

    def facts(self, state: CacheState) -> dict[str, Any]:
        kinds = [d["kind"] for d in state.decisions]
        return {
            "restarts": state.restarts,
            "stochastic": state.stochastic,
            "decisions": state.decisions,
            "full": kinds.count("full"),
            "forecast": kinds.count("forecast"),
            "blocks_computed": state.blocks_computed,
            "blocks_skipped": state.blocks_skipped,
            "peak_bytes": state.peak_bytes,
        }

    def line(self, facts: dict[str, Any]) -> str:
        if not facts or self.inactive:
            return self.inactive
        total = facts["full"] + facts["forecast"]
        line = f"forecast {facts['forecast']} of {total} evaluations, held {facts['peak_bytes'] / 2**20:.1f} MiB"
        if facts["restarts"] > 1 and not facts["forecast"]:
            return f"{line}; this sampler goes back to noisier steps {facts['restarts']} times, and each starts anew"
        return f"{line}; the sampler {ROUGH}" if facts["stochastic"] and facts["forecast"] else line


def is_flow(run: Run) -> bool:
    """Flow models run from sigma 1 to 0; on them sigma extrapolates better than the step index."""
    return float(run.model.model_sampling.sigma_max) <= 1.0 + 1e-6


class TaylorBlocks(BlockFeature, TaylorFeature):
    """Level last_block: skipped blocks pass their input on, the last one returns the forecast of its output."""

    def check_arch(self, arch, class_name: str) -> None:
        if arch is None:
            self.cannot(
                f"{self.name} does not know the blocks of {class_name}. Use level=output, which works on every model."
            )
        elif "blocks" in arch.limits:
            self.cannot(f"{self.name}: {arch.limits['blocks']} Use level=output.")

    def held_bytes(self, run: Run, noise_shape: tuple[int, ...], conds: dict[str, Any]) -> int:
        elements = stream_elements(run, noise_shape, conds) if run.arch is not None else 0
        return self._held(run, elements)

    def around_block(self, state: CacheState, forward: Forward, block: BlockPosition, streams: Streams, proceed):
        call = id(forward)
        if block.number == 0:
            state.skipping[call] = self._skips(state, forward, block, streams)
        skip = state.skipping[call]
        try:
            if not skip:
                out = proceed(streams)
                state.blocks_computed += 1
                if block.last:
                    self._store(state, forward, block, out[0])
                return out
            state.blocks_skipped += 1
            return (self._forecast(state, forward, block, streams[0]), *streams[1:]) if block.last else streams
        finally:
            if block.last:
                del state.skipping[call]

    def _skips(self, state: CacheState, forward: Forward, block: BlockPosition, streams: Streams) -> bool:
        """Only where every stream of this call has a history of the same text length: core pads prompts to a common
        length in joined CFG, so the same condition may come with more or fewer text tokens."""
        shape = _shape(streams, block)
        full = state.computes(forward.run) | self._held_back(state, forward)
        last = positions(forward.run.arch, forward.diffusion_model)[-1]
        keys = [(key, i) for i, leaf in enumerate(_leaves(streams[0])) for key in _owners(forward, leaf, last)[0]]
        if not full and all(state.shapes.get(k) == shape for k in keys) and state.ready(forward.run, keys):
            state.mark_forecast()
            return True
        for key in keys:
            if state.shapes.get(key, shape) != shape:
                state.histories.pop(key, None)
            state.shapes[key] = shape
        return False

    def _store(self, state: CacheState, forward: Forward, block: BlockPosition, output) -> None:
        for i, leaf in enumerate(_leaves(output)):
            owners, axis = _owners(forward, leaf, block)
            for key, rows in zip(owners, leaf.chunk(len(owners), axis), strict=True):
                state.store(forward.run, (key, i), rows)

    def _forecast(self, state: CacheState, forward: Forward, block: BlockPosition, like):
        leaves = []
        for i, leaf in enumerate(_leaves(like)):
            owners, axis = _owners(forward, leaf, block)
            rows = [state.predict(forward.run, (key, i)) for key in owners]
            leaves.append(rows[0] if len(rows) == 1 else torch.cat(rows, axis))
        return leaves[0] if torch.is_tensor(like) else type(like)(leaves)


class TaylorOutput(ModelFeature, TaylorFeature):
    """Level output: forecasts the model's prediction (velocity or noise, (x - x0) / sigma), on any architecture."""

    def held_bytes(self, run: Run, noise_shape: tuple[int, ...], conds: dict[str, Any]) -> int:
        return self._held(run, math.prod(noise_shape) * sum(map(len, conds.values())))

    def around_model(self, state: CacheState, forward: Forward, x, sigma, proceed):
        run = forward.run
        level = sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        owners = list(forward.keys)
        blocks = len(positions(run.arch, forward.diffusion_model)) if run.arch is not None else 1
        full = state.computes(run) | self._held_back(state, forward)
        if not full and state.ready(run, owners):
            state.mark_forecast()
            state.blocks_skipped += blocks
            rows = [state.predict(run, key) for key in owners]
            return x - level * torch.cat(rows)
        denoised = proceed()
        state.blocks_computed += blocks
        if bool((sigma > 0).all()):
            velocity = (x - denoised) / level
            for key, rows in zip(owners, velocity.chunk(len(owners)), strict=True):
                state.store(run, key, rows)
        return denoised


def _leaves(stream) -> list[torch.Tensor]:
    return [stream] if torch.is_tensor(stream) else list(stream)


def _shape(streams: Streams, block: BlockPosition):
    """Sizes of every stream but the batch's: joined and separate calls of one prompt look alike."""
    axes = [max(block.spec.axes.find("B"), 0)] + [0] * (len(streams) - 1)
    return tuple(
        (*leaf.shape[:axis], *leaf.shape[axis + 1 :])
        for axis, stream in zip(axes, streams, strict=True)
        if stream is not None
        for leaf in _leaves(stream)
    )


def _owners(forward: Forward, leaf: torch.Tensor, block: BlockPosition) -> tuple[list[Any], int]:
    """The stream of each equal chunk of the block's batch axis, and that axis; all streams as one, in their order,
    where the block has no axis of its own for the batch."""
    axis = block.spec.axes.find("B")
    if axis < 0 or leaf.shape[axis] % len(forward.keys):
        return [forward.keys], 0
    return list(forward.keys), axis
