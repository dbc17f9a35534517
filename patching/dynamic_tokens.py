"""Tokens that an MLP hardly changes skip it. The MLPs of the chosen blocks are wrapped; every few evaluations they run in
full and choose, between them only the chosen rows are gathered, computed and put back. Attention stays whole."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from .. import archs
from ..kernels.tokens.gather_rows import gather_rows
from ..methods.cache.profile import Profile
from ..methods.cache.tokens import Share, contribution, parted
from .blocks import BlockFeature, BlockPosition, Streams, block_path, positions
from .cache_each import ModuleCache
from .evaluations import Evaluations
from .forward import Forward
from .forwards import StandIn, exchange, standing
from .memory import stream_elements
from .profiles import check_profile
from .run import Feature, Run, current_forward

REGIONS = "Region-Adaptive Sampling"


@dataclass
class Choice:
    """What one stream chose in one block at its last full evaluation."""

    evaluation: int
    tokens: int
    active: torch.Tensor  # [b, M]
    rest: torch.Tensor  # [b, N - M]
    kept: torch.Tensor | None  # what the MLP gave for the rest [b, N - M, D]

    @property
    def held(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.active, self.rest, self.kept) if t is not None)


@dataclass
class TokenState(Evaluations):
    """One run of one node."""

    window: tuple[float, float]  # sigmas, noisy to clean
    lasts: int  # evaluations that a choice serves
    choices: dict[Any, Choice] = field(default_factory=dict)  # by stream, series, block and stream of the block
    entered: dict[Any, Streams] = field(default_factory=dict)  # by forward: the streams of the block being computed
    rows: int = 0  # of all chosen MLPs, had all been computed
    rows_computed: int = 0
    flops: float = 0.0
    flops_saved: float = 0.0
    peak_bytes: int = 0

    def open(self, run: Run) -> None:
        """The entry of a new evaluation; choices that would not serve it any more go."""
        if not self.begins(run):
            return
        for key in [k for k, choice in self.choices.items() if self.evaluation - choice.evaluation >= self.lasts]:
            del self.choices[key]

    def restarted(self, run: Run) -> None:
        self.choices.clear()

    def count(self, rows: int, computed: int, parameters: int) -> None:
        self.rows += rows
        self.rows_computed += computed
        self.flops += 2.0 * rows * parameters
        self.flops_saved += 2.0 * (rows - computed) * parameters
        if computed < rows:
            self.decisions[-1]["kind"] = "partial"


@dataclass(frozen=True, eq=False)
class DynamicTokens(BlockFeature):
    """Settings of one node. fill: what a skipping token gets from the MLP, "reuse" its last output or "zero"."""

    skips: ClassVar[bool] = True
    name: str = "Dynamic Tokens"
    share: Share = Share(0.3, 0.1)
    blocks: frozenset[int] | None = None  # numbers in the residual stack; None: all
    refresh_every: int = 4
    fill: str = "reuse"
    tokens: str = "image"  # or "all": text of its own stream too
    percents: tuple[float, float] = (0.0, 1.0)
    cache_device: str = "gpu"
    cache_dtype: str = "model"
    profile: Profile | None = None

    @property
    def off(self) -> bool:
        return self.refresh_every < 2 or self.share.quantile <= 0 or self.share.min_active >= 1

    def begin(self, run: Run) -> TokenState:
        check_profile(self, run)
        start, end = (run.percent_to_sigma(p) for p in self.percents)
        series = run.clock.evaluations_a_step if run.clock.returns else 1
        return TokenState((start, end), self.refresh_every * series)

    def conflicts(self, other: Feature) -> str | None:
        if isinstance(other, DynamicTokens):
            return "Dynamic Tokens is on this MODEL already, and a token cannot skip twice. Remove one of them."
        if isinstance(other, ModuleCache):
            return f"Dynamic Tokens and {other.name} at level module would both answer for MLPs. Set another level."
        if other.name == REGIONS:
            return f"Dynamic Tokens and {REGIONS} would both drop tokens of this MODEL. Remove one of them."
        return None

    def check_arch(self, arch, class_name: str) -> None:
        if arch is None:
            self.cannot(f"Dynamic Tokens does not know the blocks of {class_name}.")
        elif "blocks" in arch.limits:
            self.cannot(f"Dynamic Tokens: {arch.limits['blocks']}")
        elif not arch.mlps:
            self.cannot(f"Dynamic Tokens cannot act here: {arch.name} has no MLP apart that serves each token alone.")

    def check_model(self, arch, diffusion_model: Any) -> None:
        if arch is None or not arch.mlps or "blocks" in arch.limits:
            return
        have = {block.number for block, _, _, _ in mlps_of(arch, diffusion_model)}
        wanted = have if self.blocks is None else have & self.blocks
        count = len(positions(arch, diffusion_model))
        beyond = sorted(n for n in self.blocks or () if n >= count)
        if beyond:
            raise ValueError(f"blocks: this {arch.name} has blocks 0 to {count - 1}, there is no block {beyond[0]}.")
        if not wanted:
            raise ValueError(f"blocks: of those named none has an MLP apart; on this {arch.name} {sorted(have)} have.")

    def attached(self, model) -> None:
        """Object patches for the MLPs of this MODEL; ComfyUI restores them on unload."""
        diffusion_model = model.get_model_object("diffusion_model")
        for block, stream, path, module in mlps_of(archs.find(diffusion_model), diffusion_model):
            if not isinstance(standing(model, f"{path}.forward"), WrappedMlp):
                given = block, stream, parameters(module)
                exchange(model, path, lambda forward, _, given=given: WrappedMlp(forward, *given))

    def around_block(self, state: TokenState, forward: Forward, block: BlockPosition, streams: Streams, proceed):
        state.open(forward.run)
        state.entered[id(forward)] = streams
        try:
            return proceed(streams)
        finally:
            del state.entered[id(forward)]

    def around_mlp(self, state: TokenState, forward: Forward, mlp: "WrappedMlp", x: torch.Tensor, proceed):
        """x [B, ..., D], the MLP's input -> its output of the same shape."""
        among = self._among(state, forward, mlp, x)
        if among is None:
            return proceed(x)
        rows, count = x.shape[:-1].numel(), x.shape[1:-1].numel()
        skipped = self.share.skipped(among.stop - among.start)
        start, end = state.window
        if self.off or not skipped or not end <= forward.run.clock.sigma <= start:
            state.count(rows, rows, mlp.parameters)
            return proceed(x)
        keys = [(key, forward.run.clock.series, mlp.block.number, mlp.stream) for key in forward.keys]
        chosen = [state.choices.get(key) for key in keys]
        if any(choice is None or choice.tokens != count for choice in chosen):
            state.count(rows, rows, mlp.parameters)
            made = proceed(x)
            self._choose(state, forward, mlp, keys, made, skipped, among)
            return made
        state.count(rows, rows - skipped * x.shape[0], mlp.parameters)
        return self._partial([c for c in chosen if c is not None], x, proceed)

    def _among(self, state: TokenState, forward: Forward, mlp: "WrappedMlp", x: torch.Tensor) -> slice | None:
        """The tokens that may skip; None for an MLP that is not served."""
        streams = state.entered.get(id(forward))
        if streams is None or (self.blocks is not None and mlp.block.number not in self.blocks):
            return None
        if (mlp.stream and self.tokens == "image") or x.ndim < 3 or x.shape[0] % len(forward.keys):
            return None
        if _first(streams[mlp.stream]).shape[:-1] != x.shape[:-1]:
            return None
        count = x.shape[1:-1].numel()
        if not mlp.block.spec.joined or self.tokens == "all":
            return slice(0, count)
        told = forward.arguments.get("transformer_options") or {}
        arch, references = forward.run.arch, sum(told.get("reference_image_num_tokens") or ())
        pad = arch.pad(forward.diffusion_model)
        layout = archs.layout_of(arch, forward.grid, "joint", count, count, references, pad) if forward.grid else None
        return layout.image if layout is not None else None

    def _choose(self, state: TokenState, forward: Forward, mlp, keys, made: torch.Tensor, skipped: int, among) -> None:
        """After a full MLP: who skips until the next one, and what these tokens get."""
        score = contribution(made, _first(state.entered[id(forward)][mlp.stream]))
        active, rest = parted(score, skipped, among)
        flat, n = made.flatten(1, -2), len(keys)
        kept = [None] * n
        if self.fill == "reuse":
            dtype = made.dtype if self.cache_dtype == "model" else getattr(torch, self.cache_dtype)
            device = made.device if self.cache_device == "gpu" else torch.device(self.cache_device)
            kept = [t.to(device, dtype, copy=True) for t in gather_rows(flat, rest).chunk(n)]
        for key, a, r, k in zip(keys, active.chunk(n), rest.chunk(n), kept, strict=True):
            state.choices[key] = Choice(forward.run.clock.evaluation, flat.shape[1], a.clone(), r.clone(), k)
        state.peak_bytes = max(state.peak_bytes, sum(choice.held for choice in state.choices.values()))

    def _partial(self, chosen: list[Choice], x: torch.Tensor, proceed) -> torch.Tensor:
        """The active rows computed, the others filled, all in their places."""
        active, rest = (torch.cat([getattr(c, part) for c in chosen]) for part in ("active", "rest"))
        rows = proceed(gather_rows(x.flatten(1, -2), active))
        if self.fill == "reuse":
            fill = torch.cat([c.kept.to(rows.device, rows.dtype) for c in chosen])
        else:
            fill = rows.new_zeros(*rest.shape, rows.shape[-1])
        places = torch.cat((active, rest), 1).argsort(dim=1)  # of each token among the computed and the filled rows
        return gather_rows(torch.cat((rows, fill), 1), places).reshape(*x.shape[:-1], rows.shape[-1])

    def held_bytes(self, run: Run, noise_shape: tuple[int, ...], conds: dict[str, Any]) -> int:
        if self.off or run.arch is None or self.fill != "reuse" or self.cache_device != "gpu":
            return 0
        own = run.dtype
        size = (own if self.cache_dtype == "model" else getattr(torch, self.cache_dtype)).itemsize
        found = {b.number for b, s, _, _ in mlps_of(run.arch, run.network) if not s}
        blocks = len(found if self.blocks is None else found & self.blocks)
        series = run.clock.evaluations_a_step if run.clock.returns else 1
        return int(blocks * series * self.share.quantile * stream_elements(run, noise_shape, conds) * size)

    def facts(self, state: TokenState) -> dict[str, Any]:
        kinds = [d["kind"] for d in state.decisions]
        return {
            "decisions": state.decisions,
            "full": kinds.count("full"),
            "partial": kinds.count("partial"),
            "tokens": state.rows,
            "tokens_computed": state.rows_computed,
            "share": round(state.rows_computed / state.rows, 6) if state.rows else 1.0,
            "mlp_flops": state.flops,
            "flops_saved": state.flops_saved,
            "peak_bytes": state.peak_bytes,
        }

    def line(self, facts: dict[str, Any]) -> str:
        if not facts or self.inactive:
            return self.inactive
        if not facts["tokens"]:
            return "no MLP of the chosen blocks was met"
        saved = f"{facts['flops_saved'] / 1e9:.3g} GFLOP saved, held {facts['peak_bytes'] / 2**20:.1f} MiB"
        return f"MLPs computed {facts['share']:.1%} of their tokens, {saved}"


class WrappedMlp(StandIn):
    """Stands in for the forward of an MLP. Inert outside our runs."""

    def __init__(self, original, block: BlockPosition, stream: int, parameters: int):
        self.original, self.block, self.stream, self.parameters = original, block, stream, parameters

    def __call__(self, x, *args, **kwargs):
        forward = current_forward.get()
        features = [] if forward is None else [f for f in forward.run.acting if isinstance(f, DynamicTokens)]
        if not features:
            return self.original(x, *args, **kwargs)
        state = forward.run.states[features[0]]
        return features[0].around_mlp(state, forward, self, x, lambda rows: self.original(rows, *args, **kwargs))


def mlps_of(arch, diffusion_model: Any) -> list[tuple[BlockPosition, int, str, torch.nn.Module]]:
    """Of every block of the stack: (block, number of the stream, path below the BaseModel, module)."""
    found = []
    for block in positions(arch, diffusion_model):
        top = block_path(diffusion_model, block.spec, block.index)
        whole = diffusion_model.get_submodule(top.removeprefix("diffusion_model."))
        for stream, name in enumerate(arch.mlps.get(block.spec.path, ())):
            module: Any = whole
            for part in name.split("."):
                module = getattr(module, part, None)
            if isinstance(module, torch.nn.Module):  # the last block of SD3 has none for its text
                found.append((block, stream, f"{top}.{name}", module))
    return found


def parameters(module: torch.nn.Module) -> int:
    """Weights of its linear layers: the multiplications of one token."""
    layers = [m for m in module.modules() if hasattr(m, "in_features") and hasattr(m, "out_features")]
    return sum(m.in_features * m.out_features for m in layers)


def _first(stream) -> torch.Tensor:
    return stream if torch.is_tensor(stream) else stream[0]
