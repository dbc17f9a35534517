"""Smooth cells of image tokens go through the blocks as one token: before a block the cell is merged to its mean, after
it every token of the cell takes the mean's change. Between blocks the streams keep their full length, so what a model, a
ControlNet or another pack adds there reaches the merged tokens by its mean, and nothing else has to know."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from .. import archs
from ..kernels.tokens.merge_cells import merge_cells
from ..kernels.tokens.unmerge_cells import unmerge_cells
from ..methods.cache.grain import CELLS, Grain, cell_members, coarse_count, forced, grain_of, smoothness
from ..methods.cache.profile import Profile
from .blocks import BlockFeature, BlockPosition, Streams, positions
from .cache_attention import AttentionCache
from .cache_each import ModuleCache
from .cache_output import OutputCache
from .convention import NAMES
from .dynamic_tokens import REGIONS, DynamicTokens, parameters
from .evaluations import Evaluations
from .forward import Forward, ModelFeature
from .grain_rows import image_of, merged_arguments, unfit
from .profiles import check_profile
from .region_rows import Place
from .run import Feature, Run
from .sizes import plain_name

OVERRIDE = "optimized_attention_override"
UNUSED = 20  # evaluations after which a context window that did not come back is forgotten: caches skip as many


@dataclass
class Lane:
    """What one context window and size of latent shows: its newest estimate of the clean latent, and its map."""

    seen: int = -1  # evaluation of `newest`
    newest: dict[int, torch.Tensor] = field(default_factory=dict)  # by role: estimates of that evaluation
    estimate: torch.Tensor | None = None  # of the evaluation before, the positive's where there is one
    made: int = -1  # evaluation at which the map was made
    grain: Grain | None = None


@dataclass
class GrainState(Evaluations):
    """One run of one node."""

    window: tuple[float, float]  # sigmas, noisy to clean
    lasts: int  # evaluations that a map serves
    lanes: dict[Any, Lane] = field(default_factory=dict)
    cells: dict[Any, Any] = field(default_factory=dict)  # by grid: members of cells, and which of them are forced fine
    arguments: dict[Any, Any] = field(default_factory=dict)  # by forward: merged arguments
    declined: dict[str, int] = field(default_factory=dict)
    tokens: int = 0  # image tokens that entered the chosen blocks
    tokens_computed: int = 0
    flops: float = 0.0
    flops_saved: float = 0.0

    def open(self, run: Run) -> None:
        if not self.begins(run):
            return
        before = self.evaluation - UNUSED
        for key in [k for k, lane in self.lanes.items() if lane.seen < before]:
            del self.lanes[key]
        for lane in self.lanes.values():
            lane.estimate = lane.newest.get(0, next(iter(lane.newest.values()), None))
            lane.newest = {}

    def restarted(self, run: Run) -> None:
        self.lanes.clear()


@dataclass(frozen=True, eq=False)
class DynamicGrain(ModelFeature, BlockFeature):
    """Settings of one node. fraction: share of the whole cells that are merged."""

    inner: ClassVar[bool] = True
    skips: ClassVar[bool] = True
    name: str = "Dynamic Grain"
    fraction: float = 0.5
    cell: str = "2x2"
    measure: str = "variance"
    percents: tuple[float, float] = (0.2, 0.9)
    mass_correction: bool = True
    blocks: frozenset[int] | None = None
    refresh_every: int = 4
    mask: torch.Tensor | None = None  # [F, H, W]: cells that stay fine
    profile: Profile | None = None

    def begin(self, run: Run) -> GrainState:
        check_profile(self, run)
        start, end = (run.percent_to_sigma(p) for p in self.percents)
        return GrainState((start, end), self.refresh_every)

    def conflicts(self, other: Feature) -> str | None:
        if isinstance(other, DynamicGrain):
            return "Dynamic Grain is on this MODEL already, and would merge merged tokens. Remove one of them."
        if isinstance(other, DynamicTokens | ModuleCache | AttentionCache) or other.name == REGIONS:
            return (
                f"Dynamic Grain changes which tokens there are, and {other.name} remembers them by their places. "
                "Use one of them."
            )
        if isinstance(other, OutputCache) and not other.off:
            return (
                f"Dynamic Grain decides at every evaluation that reaches the model, and {other.name} at level output lets only "
                "some reach it. Set its level to last_block."
            )
        return None

    def check_arch(self, arch, class_name: str) -> None:
        if arch is None:
            self.cannot(f"Dynamic Grain does not know the token layout of {class_name}.")
        elif arch.limits:
            self.cannot(f"Dynamic Grain cannot act here: {next(iter(arch.limits.values()))}")
        elif any(
            spec.per_token is None or spec.axes != "BND" or "other" in spec.calls for spec in arch.blocks if spec.stack
        ):
            self.cannot(
                f"Dynamic Grain does not know what else the blocks of {arch.name} hold for single tokens, so it cannot "
                "merge tokens there."
            )
        elif arch.unordered or not arch.override:
            self.cannot(f"Dynamic Grain cannot reach the attention of {arch.name}.")

    def check_model(self, arch, diffusion_model: Any) -> None:
        count = len(positions(arch, diffusion_model)) if arch is not None else 0
        beyond = sorted(n for n in self.blocks or () if n >= count)
        if count and beyond:
            raise ValueError(f"blocks: this {arch.name} has blocks 0 to {count - 1}, there is no block {beyond[0]}.")

    def around_model(self, state: GrainState, forward: Forward, x: torch.Tensor, sigma: torch.Tensor, proceed):
        state.open(forward.run)
        if self.fraction <= 0:
            return proceed()
        try:
            made = proceed()
        finally:
            state.arguments.pop(id(forward), None)
        chunks = forward.rows(made) if torch.is_tensor(made) and made.ndim in (4, 5) else None
        for key, rows in zip(forward.keys, chunks or (), strict=False):
            lane = state.lanes.setdefault((key.window, key.shape), Lane())
            lane.seen = forward.run.clock.evaluation
            if key.role not in lane.newest:
                lane.newest[key.role] = rows.detach().clone()
        return made

    def around_block(self, state: GrainState, forward: Forward, block: BlockPosition, streams: Streams, proceed):
        start, end = state.window
        chosen = self.blocks is None or block.number in self.blocks
        if self.fraction <= 0 or not chosen or not end <= forward.run.clock.sigma <= start:
            return proceed(streams)
        image, reason = image_of(forward, block, streams)
        reason = reason or unfit(forward, block, image)
        grain = self._grain(state, forward) if reason is None else None
        if reason is not None:
            state.declined[reason] = state.declined.get(reason, 0) + 1
        if image is None:
            return proceed(streams)
        self._count(state, forward, block, image, streams[0], grain)
        if grain is None:
            return proceed(streams)
        return self._merged(state, forward, block, streams, image, grain, proceed)

    def _merged(self, state, forward: Forward, block, streams: Streams, image: Place, grain: Grain, proceed) -> Streams:
        """The block on fewer tokens."""
        at = slice(image.offset, image.offset + image.tokens)
        own = streams[0][:, at]
        before = merge_cells(own, grain.order, grain.fine, grain.size)
        short = torch.cat((streams[0][:, : at.start], before, streams[0][:, at.stop :]), 1)
        grid, given = forward.grid, forward.given
        held = state.arguments.setdefault(id(forward), {})
        forward.given = {**given, **merged_arguments(forward, block, image, grain, held)}
        if self.mass_correction and grain.size > 1:
            options = forward.arguments["transformer_options"]
            forward.given["transformer_options"] = _with_mass(options, block, image, grain)
        forward.grid = None  # no other node may take the short sequence for the full one
        try:
            out = proceed((short, *streams[1:]))
        finally:
            forward.grid, forward.given = grid, given
        stop = at.start + grain.merged
        back = unmerge_cells(own, before, out[0][:, at.start : stop], grain.owner, grain.fine)
        return (torch.cat((out[0][:, : at.start], back, out[0][:, stop:]), 1), *out[1:])

    def _grain(self, state: GrainState, forward: Forward) -> Grain | None:
        """The map of this evaluation for every row of the call; None where nothing is known or merged yet."""
        key, clock = forward.keys[0], forward.run.clock
        lane = state.lanes.get((key.window, key.shape))
        if lane is None or any((k.window, k.shape) != (key.window, key.shape) for k in forward.keys):
            return None
        due = lane.grain is None or clock.evaluation - lane.made >= state.lasts
        if due and lane.made != clock.evaluation:
            lane.made, lane.grain = clock.evaluation, self._map(state, forward.grid, lane.estimate)
        if lane.grain is not None and lane.grain.order.shape[1] != math.prod(forward.grid or (0,)):
            return None
        held = state.arguments.setdefault(id(forward), {})
        if lane.grain is not None and "grain" not in held:
            held["grain"] = lane.grain.repeated(len(forward.keys))
        return held.get("grain")

    def _map(self, state: GrainState, grid, estimate: torch.Tensor | None) -> Grain | None:
        if estimate is None:
            return None
        if grid not in state.cells:
            members = cell_members(grid, CELLS[self.cell])
            keep = None if self.mask is None else forced(self.mask.cpu(), grid, members)
            state.cells[grid] = members, keep
        members, keep = state.cells[grid]
        free = len(members) if keep is None else int((~keep).sum())
        count = coarse_count(len(members), self.fraction, free)
        if not count:
            return None
        score = smoothness(estimate, grid, members, self.measure)
        if keep is not None:
            score = score.masked_fill(keep.to(score.device), math.inf)
        return grain_of(score, members, math.prod(grid), count)

    def _count(self, state: GrainState, forward: Forward, block, image: Place, stream, grain: Grain | None) -> None:
        """Linear layers and attention of image tokens, two operations a multiplication."""
        rows, width = stream.shape[0], stream.shape[-1]
        left = image.tokens if grain is None else grain.merged
        state.tokens += rows * image.tokens
        state.tokens_computed += rows * left
        each = parameters_of(forward.diffusion_model, block)
        others = image.total - image.tokens
        cost = [2.0 * rows * (each * n + 2 * width * (n + others) ** 2) for n in (image.tokens, left)]
        state.flops += cost[0]
        state.flops_saved += cost[0] - cost[1]
        if grain is not None:
            state.decisions[-1]["kind"] = "merged"

    def facts(self, state: GrainState) -> dict[str, Any]:
        kinds = [d["kind"] for d in state.decisions]
        return {
            "decisions": state.decisions,
            "full": kinds.count("full"),
            "merged": kinds.count("merged"),
            "tokens": state.tokens,
            "tokens_computed": state.tokens_computed,
            "share": round(state.tokens_computed / state.tokens, 6) if state.tokens else 1.0,
            "flops_saved": state.flops_saved,
            "flops_fraction": round(1 - state.flops_saved / state.flops, 6) if state.flops else 1.0,
            "declined": dict(state.declined),
        }

    def line(self, facts: dict[str, Any]) -> str:
        if not facts or self.inactive:
            return self.inactive
        declined = "".join(f"; {n} blocks left whole: {why}" for why, n in facts["declined"].items())
        if not facts["tokens"]:
            return f"no block was met in the chosen part of the run{declined}"
        merged = f"merged in {facts['merged']} of {facts['full'] + facts['merged']} evaluations"
        saved = f"{facts['share']:.1%} of the tokens there, {facts['flops_saved'] / 1e9:.3g} GFLOP saved"
        return f"{merged}: {saved}{declined}"


def _with_mass(options: dict[str, Any], block: BlockPosition, image: Place, grain: Grain) -> dict[str, Any]:
    """Options whose attention adds log(size) to the logits of merged keys, so that a cell weighs as all its tokens."""
    earlier, met = options.get(OVERRIDE), [0]
    cells = grain.merged - grain.fine

    def weighed(func, *args, **kwargs):
        call = earlier if earlier is None else lambda *a, **k: earlier(func, *a, **k)
        run = func if call is None else call
        kinds, nth = block.spec.calls, met[0]
        met[0] += 1
        kind = kinds[nth % len(kinds)] if kinds else "other"
        given = {**dict(zip(NAMES, args, strict=False)), **kwargs}
        keys = given["k"].shape[2 if given.get("skip_reshape") else 1]
        start, total = image.of(kind, block.spec.joined)
        if kind not in ("self", "joint") or keys != total - image.tokens + grain.merged:
            return run(*args, **kwargs)
        bias = given["q"].new_zeros(1, 1, 1, keys)
        bias[..., start + grain.fine : start + grain.fine + cells] = math.log(grain.size)
        mask = given.get("mask")
        if mask is not None:
            mask = mask[None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
            bias = torch.where(mask, bias, -math.inf) if mask.dtype == torch.bool else bias + mask
        rest = {n: value for n, value in given.items() if n not in NAMES[:4]}
        return run(*(given[n] for n in NAMES[:4]), **{**rest, "mask": bias})

    return {**options, OVERRIDE: weighed}


def parameters_of(diffusion_model: Any, block: BlockPosition) -> float:
    """Weights of a block that multiply one image token, all but those that modulate; half where text has its own."""
    module = archs.block_modules(diffusion_model, block.spec)[block.index][1]
    named = [(plain_name(name).lower(), part) for name, part in module.named_modules()]
    apart = [part for name, part in named if "mod" in name or "adaln" in name]
    weights = parameters(module) - sum(m.in_features * m.out_features for m in apart if hasattr(m, "in_features"))
    return weights / len(block.spec.streams)
