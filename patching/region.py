"""Region-Adaptive Sampling (arXiv 2502.10389) on any block stack whose per-token arguments are known: at most steps
only some image tokens go through the blocks. They attend to the keys and values of all, which every layer keeps; the
other tokens go on with the model's last prediction for them.

Between blocks the streams keep their full length, so that what a model, a ControlNet or another pack does there still
fits; rows of tokens that are left out hold nothing of meaning, and nothing reads them."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import comfy.model_management
import torch

from ..kernels.tokens.gather_rows import gather_rows
from ..kernels.tokens.scatter_rows import scatter_rows
from ..methods.cache.profile import Profile
from ..methods.cache.region import (
    Choice,
    ages,
    latent_mask,
    region_tokens,
    sparse_steps,
)
from ..methods.cache.schedule import Schedule
from .attention import AttentionFeature
from .attention_around import KeyFeature
from .blocks import BlockFeature, BlockPosition, Streams, positions
from .cache import DOUBLED, EASYCACHE, CacheFeature
from .clear_weights import ClearFeature
from .forward import Forward, ModelFeature
from .memory import grid_of
from .profiles import check_profile
from .region_rows import gathered, patch_of, place_of, unfit, widened
from .region_state import FP8, Call, Lane, RegionState, activity_map
from .run import Feature, Run
from .sizes import heads_of

BUDGET = 0.5  # of the device's memory that keys and values may take
DTYPES = {"model": None, "bfloat16": torch.bfloat16, "fp8_e4m3": FP8}


@dataclass(frozen=True, eq=False)
class RegionFeature(ModelFeature, BlockFeature, KeyFeature):
    """Settings of the node. reset_steps: dense steps after the first ones; None: every reset_every-th."""

    skips: ClassVar[bool] = True
    name: str = "Region-Adaptive Sampling"
    choice: Choice = field(default_factory=Choice)
    start_step: int = 4
    end_percent: float = 1.0
    reset_every: int = 8
    reset_steps: frozenset[int] | None = None
    kv_cache_dtype: str = "model"
    cache_device: str = "gpu"
    region_mask: torch.Tensor | None = None  # [F, H, W]: always computed
    schedule: Schedule | None = None
    profile: Profile | None = None

    @property
    def off(self) -> bool:
        return self.choice.ratio >= 1

    def begin(self, run: Run) -> RegionState:
        check_profile(self, run)
        steps, end = run.clock.steps, run.percent_to_sigma(self.end_percent)
        sigmas = run.clock.sigmas
        plan = sparse_steps(steps, self.start_step, self.reset_every, self.reset_steps)
        if self.schedule is not None:
            plan = [not dense for dense in self.schedule.for_run(sigmas[:-1] or sigmas)]
        return RegionState([s and i < len(sigmas) and sigmas[i] >= end for i, s in enumerate(plan)])

    def check_arch(self, arch, class_name: str) -> None:
        if arch is None:
            self.cannot(f"{self.name} does not know the blocks of {class_name}.")
        for limit in ("blocks", "attention"):
            if limit in arch.limits:
                self.cannot(f"{self.name} cannot act here: {arch.limits[limit]}")
        if any(spec.per_token is None or spec.axes != "BND" for spec in arch.blocks if spec.stack):
            self.cannot(
                f"{self.name} does not know which arguments of the blocks of {arch.name} belong to single tokens, "
                "so it cannot leave tokens out there."
            )
        if not arch.override:
            self.cannot(f"{self.name} cannot reach the keys and values of {arch.name}.")

    def conflicts(self, other: Feature) -> str | None:
        if isinstance(other, CacheFeature | RegionFeature):
            return (
                f"{self.name} found a {other.name} on this MODEL: both go on from the last prediction, and each would "
                "take the other's for the model's own. Use one of them."
            )
        method = other.method if isinstance(other, AttentionFeature) else None
        trained = any(getattr(method, name, None) is not None for name in ("trained", "projections"))
        if trained or isinstance(other, ClearFeature):
            return (
                f"{other.name} on this MODEL has weights trained for its own attention, but steps of {self.name} that "
                "leave tokens out attend densely. Remove one of them."
            )
        return None

    def refuses(self, transformer_options: dict[str, Any]) -> str | None:
        if EASYCACHE in transformer_options and not self.off:
            return DOUBLED.format(self.name)
        return None

    def held_bytes(self, run: Run, noise_shape: tuple[int, ...], conds: dict[str, Any]) -> int:
        """Keys and values of every block and prompt. ValueError where they would take more than half the memory."""
        grid = grid_of(run, noise_shape) if run.arch is not None and not self.off else None
        if grid is None or self.cache_device != "gpu" or not any(run.states[self].sparse):
            return 0
        model = run.network
        heads, width = heads_of(model)
        tokens, blocks = math.prod(grid), len(positions(run.arch, model))
        rows = noise_shape[0] * sum(map(len, conds.values()))
        dtype = DTYPES[self.kv_cache_dtype] or run.dtype
        held = 2 * blocks * rows * tokens * heads * (width * dtype.itemsize + (4 if dtype == FP8 else 0))
        budget = BUDGET * comfy.model_management.get_total_memory(comfy.model_management.get_torch_device())
        if held > budget:
            less = "" if self.kv_cache_dtype == "fp8_e4m3" else " or kv_cache_dtype to fp8_e4m3"
            raise ValueError(
                f"{self.name} would hold keys and values of {tokens} tokens in {blocks} blocks for {rows} rows, "
                f"{held / 2**30:.1f} GiB of the {budget / 2**30:.1f} GiB it may take. Set cache_device to cpu{less}, or use "
                "a smaller picture; Taylor Cache holds far less."
            )
        return held

    def around_model(self, state: RegionState, forward: Forward, x: torch.Tensor, sigma: torch.Tensor, proceed):
        if self.off:
            return proceed()
        run = forward.run
        state.open(run)
        lane = state.lane(forward)
        if lane.step != run.clock.step:
            self._advance(state, lane, run)
        active = lane.active if state.ready(forward) else None
        stores = any(state.sparse[run.clock.step : run.clock.step + 2])
        call = state.calls[id(forward)] = Call(lane, active, stores)
        try:
            made = proceed()
        finally:
            del state.calls[id(forward)]
        if run.clock.sigma <= 0:
            return made
        return self._settle(state, call, forward, x, sigma, made)

    def _advance(self, state: RegionState, lane: Lane, run: Run) -> None:
        """At the first call of a step: its tokens, from what the last step's evaluations gave. The same whether prompts
        come together or apart, and in which order."""
        lane.step, lane.active = run.clock.step, None
        if lane.left_out is None:
            return
        if state.sparse[lane.step] and lane.measured and self._whole(state, lane):
            newest = max(at for at, _ in lane.measured.values())
            fresh = {key: value for key, (at, value) in lane.measured.items() if at == newest}
            wanted = [value for key, value in fresh.items() if key.role == 0] or list(fresh.values())
            later = [s for s, sparse in enumerate(state.sparse) if sparse]
            at = later.index(lane.step) / max(1, len(later) - 1)
            count = max(lane.least, self.choice.count(lane.left_out.shape[-1], at))
            lane.active = self.choice.choose(torch.stack(wanted).mean(0), lane.left_out, lane.always, count)
        lane.left_out = ages(lane.left_out, lane.active)
        lane.steps += 1
        assert lane.activity is not None
        lane.activity += (lane.left_out == 0).float().mean(0)

    def _whole(self, state: RegionState, lane: Lane) -> bool:
        """Whether region_mask, if there is one, lies on this lane's picture: a prompt for a part has a smaller one."""
        if self.region_mask is None or lane.grid is None:
            return True
        others = [other.grid for other in state.lanes.values() if other.grid is not None]
        return all(lane.grid[1] >= h and lane.grid[2] >= w for _, h, w in others)

    def _settle(self, state: RegionState, call: Call, forward: Forward, x, sigma, made):
        """The prediction put together, and what the next step needs of it."""
        lane, keys, run = call.lane, forward.keys, forward.run
        level = sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        v = (x - made) / level
        if call.active is not None:
            state.decisions[-1]["kind"] = "region"
            fresh = latent_mask(call.active, lane.grid, lane.patch, keys[0].shape).repeat(
                len(keys), *[1] * (x.ndim - 1)
            )
            v = torch.where(fresh, v, torch.cat([state.velocity[key] for key in keys]))
            made = torch.where(fresh, made, (x - level * v).to(made.dtype))
        else:
            state.settled(forward, call, len(positions(run.arch, forward.diffusion_model)))
        for key, part in zip(keys, v.chunk(len(keys)), strict=True):
            lane.measure(key, part, state.velocity.get(key), self.choice.metric, call.active, run.clock.evaluation)
            state.velocity[key], state.used[key] = part, run.clock.evaluation
        return made

    def around_block(self, state: RegionState, forward: Forward, block: BlockPosition, streams: Streams, proceed):
        call = state.calls.get(id(forward))
        if call is None:
            return proceed(streams)
        call.nth = 0
        call.place, reason = place_of(forward, block, streams)
        reason = reason or unfit(forward, block, call.place, streams)
        first, call.started = not call.started, True
        if first:
            self._enter(state, call, forward, reason)
        if call.active is None:
            call.reason = call.reason or (reason if call.stores else None)
            return proceed(streams)
        if reason is not None:
            raise ValueError(f"{self.name} met a block of this model that it cannot serve: {reason}.")
        return self._short(call, forward, block, streams, proceed)

    def _enter(self, state: RegionState, call: Call, forward: Forward, reason: str | None) -> None:
        """At the first block: the grid is known, and with it whether this call can leave tokens out."""
        lane, place = call.lane, call.place
        if call.active is not None and (reason is not None or forward.grid != lane.grid):
            call.active, call.stores = None, True
        if reason is None and place is not None and forward.grid is not None:
            if forward.grid != lane.grid:
                self._lay_out(lane, forward, place.tokens)
            rows = lane.samples * len(forward.keys)
            state.tokens += place.tokens * rows
            state.computed += rows * (place.tokens if call.active is None else call.active.shape[-1])

    def _lay_out(self, lane: Lane, forward: Forward, tokens: int) -> None:
        device = forward.x.device if isinstance(forward.x, torch.Tensor) else torch.device("cpu")
        lane.grid = forward.grid
        lane.patch = patch_of(forward.run.arch, forward.diffusion_model, forward.keys[0].shape)
        lane.left_out = torch.zeros(lane.samples, tokens, device=device)
        lane.activity = torch.zeros(tokens, device=device)
        lane.measured.clear()
        if self.region_mask is not None:
            always = region_tokens(self.region_mask.cpu(), lane.grid, lane.samples)
            lane.least, lane.always = int(always.sum(-1).max()), always.to(device)

    def _short(self, call: Call, forward: Forward, block: BlockPosition, streams: Streams, proceed) -> Streams:
        place = call.place
        assert place is not None
        rows = call.places(place.offset, place.stream, len(forward.keys))
        sequence = call.places(place.start, place.total, len(forward.keys))
        before = forward.given
        forward.given = {
            **before,
            **gathered(forward.arguments, block.spec.per_token, place, rows, sequence, streams[0]),
        }
        try:
            out = proceed((gather_rows(streams[0], rows), *streams[1:]))
        finally:
            forward.given = before
        return (scatter_rows(streams[0], out[0].to(streams[0].dtype), rows), *out[1:])

    def around_keys(self, state: RegionState, forward: Forward, q, k, v, mask):
        call = state.calls.get(id(forward))
        if call is None or call.place is None:
            return None
        spec, place = forward.block.spec, call.place
        kind, at = spec.calls[call.nth % len(spec.calls)], (forward.block.number, call.nth)
        call.nth += 1
        if kind not in ("self", "joint"):
            return None
        start, total = place.of(kind, spec.joined)
        image = slice(start, start + place.tokens)
        if call.active is None:
            if call.stores and k.shape[2] == q.shape[2] == total:
                dtype = DTYPES[self.kv_cache_dtype]
                for key, mine, its in zip(
                    forward.keys, *(t[:, :, image].chunk(len(forward.keys)) for t in (k, v)), strict=True
                ):
                    state.keep(key, at, mine, its, dtype, None if self.cache_device == "gpu" else self.cache_device)
                call.filled.add(forward.block.number)
            return None
        short = total - place.tokens + call.active.shape[-1]
        if not k.shape[2] == q.shape[2] == short:
            raise ValueError(
                f"{self.name}: block {forward.block.number} attends with {q.shape[2]} queries to {k.shape[2]} keys, "
                f"where {short} of {total} tokens were given to it. Another node changes this attention; remove one of them."
            )
        k, v = (state.full(forward.keys, (at, which), t, image, total, call.active) for which, t in enumerate((k, v)))
        return k, v, widened(mask, image, short, total, call.places(start, total, len(forward.keys)))

    def facts(self, state: RegionState) -> dict[str, Any]:
        kinds = [d["kind"] for d in state.decisions]
        return {
            "decisions": state.decisions,
            "full": kinds.count("full"),
            "region": kinds.count("region"),
            "tokens_computed": state.computed,
            "tokens": state.tokens,
            "tokens_fraction": round(state.computed / state.tokens, 6) if state.tokens else 1.0,
            "computed_in_full": dict(state.reasons),
            "activity": activity_map(state),
            "peak_bytes": state.peak_bytes,
        }

    def line(self, facts: dict[str, Any]) -> str:
        if not facts or self.inactive:
            return self.inactive
        whole = "".join(f"; {n} calls computed in full: {why}" for why, n in facts["computed_in_full"].items())
        return (
            f"{facts['region']} of {len(facts['decisions'])} evaluations left tokens out, "
            f"{1 - facts['tokens_fraction']:.1%} of all image tokens saved, "
            f"held {facts['peak_bytes'] / 2**20:.1f} MiB{whole}"
        )
