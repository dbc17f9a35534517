"""A pose video on DynamiCtrl's MODEL: its chain of tokens, which is the same for every row of a batch, and what each
block adds of it to the picture's rows of its attention input."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from .control import ControlFeature, encode, spread, to_model
from .dynamictrl import PoseNorms, norms_of, patch_of, tokens
from .run import Run, attach, current_forward
from .widgets import percents

NAME = "Apply Pose Control"


@dataclass(eq=False)
class Chain:
    """The chain of one timestep, as far as blocks have asked for it."""

    key: tuple[Any, ...]  # of what it was made, apart from the timestep
    temb: torch.Tensor  # [1 or b, T]
    c: torch.Tensor  # [b, N, D], what block `at` takes
    at: int = 0
    kept: list[torch.Tensor] = field(default_factory=list)  # y of the blocks before, where they are kept


@dataclass(eq=False)
class PoseState:
    chain: Chain | None = None
    forward: Any = None  # the call that `chain` was looked up for
    start: tuple[Any, torch.Tensor] | None = None  # (key, c_0), which no timestep changes
    calls: int = 0  # of the diffusion model
    chains: int = 0  # begun
    steps: int = 0  # links of chains computed


@dataclass(frozen=True, eq=False)
class PoseFeature(ControlFeature):
    name: str = NAME
    norms: PoseNorms | None = None
    latent: torch.Tensor | None = None  # [b, 16, T, h, w] in the model's space, on the CPU
    cache: bool = True

    def begin(self, run: Run) -> PoseState:
        shape = run.latent_shapes[0] if run.latent_shapes else ()
        if len(shape) == 5:
            self._same(tuple(shape[2:]))
        return PoseState()

    def _same(self, size: tuple[int, ...]) -> None:
        have = tuple(self._latent().shape[2:])
        if have != size:
            raise ValueError(
                f"The pose video has {have[0]} x {have[1]} x {have[2]} latent cells (time x height x width), and the video "
                f"to be drawn {size[0]} x {size[1]} x {size[2]}. Give both the same size and number of frames."
            )

    def _latent(self) -> torch.Tensor:
        assert self.latent is not None
        return self.latent

    def _modules(self) -> torch.nn.ModuleList:
        assert self.norms is not None
        return self.norms.norms

    def attached(self, model: Any) -> None:
        for index in range(len(model.model.diffusion_model.blocks)):
            path = f"diffusion_model.blocks.{index}.norm1.forward"
            model.add_object_patch(path, PoseNorm1(model.get_model_object(path), index, self))

    def added(self, forward: Any, index: int, base: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """base [B, N, D], what block `index` made of the picture -> with the pose in it."""
        state: PoseState = forward.run.states[self]
        chain = self._chain(state, forward, base, temb)
        if base.shape[1] != chain.c.shape[1]:
            raise ValueError(
                f"{NAME} has {chain.c.shape[1]} pose tokens and block {index} computes {base.shape[1]} picture tokens. "
                "Remove the node that computes a part of them."
            )
        if index < chain.at and len(chain.kept) <= index:  # computed again, and not kept
            chain = self._begun(state, forward, chain.key, chain.temb, base)
        modules = self._modules()
        while chain.at < index or (chain.at == index and self.cache):
            y, chain.c = modules[chain.at](chain.c, chain.temb)
            chain.at, state.steps = chain.at + 1, state.steps + 1
            if self.cache:
                chain.kept.append(y)
        if self.cache:
            return torch.add(base, chain.kept[index], alpha=self.strength)
        out, chain.c = modules[index](chain.c, chain.temb, base, self.strength)
        chain.at, state.steps = chain.at + 1, state.steps + 1
        return out

    def _chain(self, state: PoseState, forward: Any, base: torch.Tensor, temb: torch.Tensor) -> Chain:
        """The chain of this call: the one at hand where it is of the same timestep."""
        if state.forward is forward and state.chain is not None:
            return state.chain
        state.forward, state.calls = forward, state.calls + 1
        times = _times(forward)
        alike = (
            times is not None and len(set(times)) == 1
        )  # rows of a batch share their timestep; else each has its own
        one = temb[:1] if alike else temb
        rows = 1 if alike and self._latent().shape[0] == 1 else base.shape[0]
        window = forward.options.get("context_window")
        frames = (forward.keys[0].window, getattr(window, "causal_anchor_index", None))
        key = (frames, rows, base.dtype, base.device)
        had = state.chain
        if self.cache and alike and had is not None and had.key == key and _same_embedding(had.temb, one):
            return had
        return self._begun(state, forward, key, one, base)

    def _begun(self, state: PoseState, forward: Any, key: tuple, temb: torch.Tensor, base: torch.Tensor) -> Chain:
        if state.start is None or state.start[0] != key:
            window, rows = forward.options.get("context_window"), key[1]
            latent = self._latent() if window is None else window.get_tensor(self._latent(), dim=2)
            if latent.shape[2:] != forward.x.shape[2:]:
                self._same(tuple(forward.x.shape[2:]))
            if rows > 1:
                latent = spread(latent, rows, len(forward.keys))
            state.start = key, tokens(forward.diffusion_model, latent.to(base.device), base.dtype)
        state.chain = None  # its memory is free before the next is made
        state.chains += 1
        state.chain = Chain(key, temb.clone(), state.start[1])
        return state.chain

    def held_bytes(self, run: Run, noise_shape: tuple[int, ...], conds: dict[str, Any]) -> int:
        network, latent = run.model.diffusion_model, self._latent()
        count = math.prod(-(-side // p) for side, p in zip(latent.shape[2:], patch_of(network), strict=True))
        rows = 1 if latent.shape[0] == 1 else noise_shape[0] * sum(len(part) for part in conds.values())
        held = len(network.blocks) + 2 if self.cache else 3  # y of each block; c and c_0
        return held * rows * count * network.dim * run.dtype.itemsize if self.strength else 0

    def facts(self, state: PoseState | None) -> dict[str, Any]:
        made = state or PoseState()
        return {"strength": self.strength, "calls": made.calls, "chains": made.chains, "steps": made.steps}

    def line(self, facts: dict[str, Any]) -> str:
        if self.inactive or not facts:
            return self.inactive
        if not facts["calls"]:
            return "it did not act: strength 0, or no step between start_percent and end_percent"
        return f"pose in {facts['calls']} calls of the model, {facts['chains']} chains computed"


def _times(forward: Any) -> tuple[tuple[float, ...], ...] | None:
    """(timestep, ofs) of each row of a call; None where it is not told."""
    if forward.timestep is None:
        return None
    told = [forward.timestep, forward.inputs.get("ofs")]
    return tuple(zip(*(t.expand(len(told[0])).tolist() for t in told if t is not None), strict=True))


def _same_embedding(had: torch.Tensor, one: torch.Tensor) -> bool:
    """Whether two embeddings [1, T] are of one timestep: products of other batches differ in their last bits."""
    if had.shape != one.shape:
        return False
    return bool((had - one).norm() <= 8 * torch.finfo(one.dtype).eps * one.norm())


class PoseNorm1:
    """Stands in for the forward of a block's norm1. Inert outside our runs."""

    def __init__(self, original: Any, index: int, feature: PoseFeature):
        self.original, self.index, self.feature = original, index, feature

    @torch.compiler.disable  # what it does depends on the run
    def __call__(self, hidden, encoder, temb, *rest, **named):
        """hidden [B, N, D], encoder [B, L, D], temb [B, T] -> both normed, and their gates."""
        out = self.original(hidden, encoder, temb, *rest, **named)
        forward = current_forward.get()
        if forward is None or self.feature not in forward.run.acting or not self.feature.acts(forward.run):
            return out
        return (self.feature.added(forward, self.index, out[0], temb), *out[1:])


def apply(model, node, video, vae, latent, strength: float, start: float, end: float, cache: bool):
    """A clone of the MODEL with that pose video on it."""
    norms = norms_of(model, NAME)
    if (video is None) == (latent is None):
        given = "both are" if video is not None else "neither is"
        raise ValueError(
            f"{NAME} takes the pose from a pose_video or from a latent, and {given} connected. Connect one."
        )
    condition = encode(model, vae, video, NAME) if video is not None else to_model(model, latent["samples"], NAME)
    feature = PoseFeature(
        node, strength=strength, percents=percents(start, end), norms=norms, latent=condition, cache=cache
    )
    return attach(model, feature)
