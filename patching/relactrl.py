"""RelaCtrl on a stock PixArt: its control blocks run between the base's, and each base block takes their residual."""

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import comfy.utils
import torch
from comfy_api.latest import io

from .. import archs
from ..methods.control.relactrl import ControlBlock, Draws, RelaCtrl, check_tokens, control_block, draw_bytes
from ..methods.control.relactrl_keys import read
from ..methods.files.place import CONVERTER
from ..methods.weight_files import read_weights
from .blocks import BlockFeature, BlockPosition, Streams
from .cache_blocks import StackCache
from .control import ControlFeature, encode, rgb, spread, to_model
from .forward import Forward
from .memory import grid_of
from .run import Run, attach, current_forward

log = logging.getLogger("tessera")
NAME = "Apply RelaCtrl"
RelaCtrlSocket = io.Custom("TESSERA_RELACTRL")
Condition = Callable[[tuple[int, ...]], torch.Tensor]  # shape of the noise -> latent [b, C, h, w] as the model sees it


@dataclass(eq=False)
class Call:
    """One call of the model, while it lasts."""

    forward: Forward
    acts: bool
    at: int = -1  # the last control block that was computed in it
    tokens: torch.Tensor | None = None  # the control's own
    residual: torch.Tensor | None = None


@dataclass(eq=False)
class ControlState:
    """What one run holds."""

    latent: torch.Tensor | None = None  # the condition [b, C, h, w], fp32 on the CPU
    weights: dict[Any, tuple[ControlBlock, ...]] = field(default_factory=dict)  # by device and dtype
    tokens: dict[Any, torch.Tensor] = field(default_factory=dict)  # of the condition [b, L, D], likewise
    draws: dict[Any, tuple[int, Draws]] = field(default_factory=dict)  # by device: evaluation or step, permutations
    calls: dict[str, Call] = field(default_factory=dict)  # by device: the newest
    holds: bool = False  # whether a cache may skip blocks before one that is computed
    held: dict[Any, torch.Tensor] = field(default_factory=dict)  # (control block, stream) -> its last residual
    notes: list[str] = field(default_factory=list)
    acted: int = 0  # calls of the model
    computed: int = 0  # control blocks
    added: int = 0  # residuals
    reused: int = 0  # of those, held from an earlier evaluation
    drawn: int = 0  # sets of permutations


@dataclass(frozen=True, eq=False)
class RelaCtrlFeature(ControlFeature, BlockFeature):
    """Settings of one node."""

    inner: ClassVar[bool] = True  # a base block with its residual is what caches may answer for

    name: str = NAME
    control: RelaCtrl = None  # type: ignore[assignment]
    condition: Condition = None  # type: ignore[assignment]
    permutation: str = "fixed"
    seed: int = 0
    repeat: bool = True  # a residual goes to every base block until the next control block, not to the first alone

    def check_arch(self, arch, class_name: str) -> None:
        if arch is None or arch.home != "pixart":
            kind = class_name if arch is None or arch.name == "PixArt" else arch.name
            self.cannot(
                f"RelaCtrl controls PixArt, and this MODEL is {kind}. Load PixArt-alpha in ComfyUI's own loader."
            )

    def check_model(self, arch, diffusion_model: Any) -> None:
        width, count = diffusion_model.hidden_size, len(diffusion_model.blocks)
        most = self.control.places[-1] + 2
        if width != self.control.width or count < most:
            raise ValueError(
                f"{self.control.name} is for a PixArt of width {self.control.width} with at least {most} blocks, and this one has width "
                f"{width} and {count} blocks."
            )

    def begin(self, run: Run) -> ControlState:
        state = ControlState(holds=any(isinstance(f, StackCache) and f.last_blocks for f in run.acting))
        kind = type(run.patcher.get_model_object("latent_format")).__name__
        if kind != "SD15":
            state.notes.append(f"trained in PixArt-alpha's latent space, and this MODEL's is {kind}")
            log.warning("%s: %s was %s.", self.name, self.control.name, state.notes[-1])
        return state

    def prepare(self, run: Run, noise_shape: tuple[int, ...]) -> None:
        if self.strength == 0:
            return
        grid = grid_of(run, noise_shape)
        if grid is not None:
            check_tokens(*grid[1:])
        run.states[self].latent = self.condition(noise_shape)

    def held_bytes(self, run: Run, noise_shape: tuple[int, ...], conds: dict[str, Any]) -> int:
        grid = grid_of(run, noise_shape)
        if grid is None or self.strength == 0:
            return 0
        size = run.dtype.itemsize
        tokens, rows = grid[1] * grid[2], noise_shape[0] * sum(map(len, conds.values()))
        kept = len(self.control.blocks) if run.states[self].holds else 2
        own = self.control.parameters + (noise_shape[0] + rows * kept) * tokens * self.control.width
        return size * own + draw_bytes(self.control.blocks, tokens)

    def around_block(self, state: ControlState, forward: Forward, block: BlockPosition, streams: Streams, proceed):
        x = streams[0]
        call = state.calls.get(str(x.device))
        if call is None or call.forward is not forward:
            call = state.calls[str(x.device)] = Call(forward, self.acts(forward.run))
            state.acted += call.acts
        residual = self._residual(state, call, block.number, x) if call.acts and block.number else None
        if block.last:
            del state.calls[str(x.device)]
        if residual is None:
            return proceed(streams)
        state.added += 1
        return proceed((x + self.strength * residual, *streams[1:]))

    def _residual(self, state: ControlState, call: Call, number: int, x: torch.Tensor) -> torch.Tensor | None:
        """For the base block of that number with the input x. Behind a cache that has skipped control blocks in this call it
        is that of the last evaluation: what the cache fills in is from then too."""
        n = bisect_left(self.control.places, number) - 1
        here = self.control.places[n] == number - 1
        if n < 0 or not (here or self.repeat):
            return None
        if here and call.at == n - 1:
            self._compute(state, call, n, x)
        elif call.at != n:
            found = [state.held.get((n, key)) for key in call.forward.keys]
            rows = [f for f in found if f is not None]
            call.residual = torch.cat(rows).to(x) if len(rows) == len(found) else None
            state.reused += call.residual is not None
        return call.residual

    def _compute(self, state: ControlState, call: Call, n: int, x: torch.Tensor) -> None:
        forward = call.forward
        weights = self._weights(state, x)
        c = self._tokens(state, forward, x) if n == 0 else call.tokens
        t0 = forward.arguments["t"]
        call.tokens, call.residual = control_block(weights[n], n == 0, x, c, t0, self._draws(state, forward, x)[n])
        call.at = n
        state.computed += 1
        if state.holds and (rows := forward.rows(call.residual)) is not None:
            state.held |= {(n, key): part for key, part in zip(forward.keys, rows, strict=True)}

    def _weights(self, state: ControlState, x: torch.Tensor) -> tuple[ControlBlock, ...]:
        key = x.device, x.dtype
        if key not in state.weights:
            state.weights[key] = tuple(block.to(*key) for block in self.control.blocks)
        return state.weights[key]

    def _tokens(self, state: ControlState, forward: Forward, x: torch.Tensor) -> torch.Tensor:
        key = x.device, x.dtype
        if key not in state.tokens:
            assert state.latent is not None
            state.tokens[key] = tokens_of(forward, state.latent.to(*key))
        found = state.tokens[key]
        if found.shape[1] != x.shape[1]:
            raise ValueError(
                f"RelaCtrl has {found.shape[1]} tokens of its condition, and this prompt is computed on {x.shape[1]}: it serves prompts "
                "that span the picture. Remove the area from the prompt."
            )
        return spread(found, x.shape[0], len(forward.keys))

    def _draws(self, state: ControlState, forward: Forward, x: torch.Tensor) -> Draws:
        """One set for all conditions of an evaluation: the rows of a guidance batch are drawn alike."""
        clock = forward.run.clock
        number = {"fixed": 0, "per_step": clock.step, "per_call": clock.evaluation}[self.permutation]
        known = state.draws.get(str(x.device))
        if known is None or known[0] != number:
            widths = [block.widths for block in self.control.blocks]
            known = state.draws[str(x.device)] = number, Draws(self.seed + number, widths, x.shape[1], x.device)
            state.drawn += 1
        return known[1]

    def facts(self, state: ControlState) -> dict[str, Any]:
        return {
            "calls": state.acted,
            "control_blocks": state.computed,
            "residuals": state.added,
            "residuals_reused": state.reused,
            "permutations": state.drawn,
            "parameters": self.control.parameters,
            "notes": list(state.notes),
        }

    def line(self, facts: dict[str, Any]) -> str:
        if not facts:
            return ""
        told = (
            f"{facts['control_blocks']} control blocks in {facts['calls']} model calls, {self.permutation} permutation"
        )
        return "; ".join([told, *facts["notes"]])


class _Reached(Exception):
    """The model has come to its first block."""


class _Stop(BlockFeature):
    """Ends a call of the model there."""

    def around_block(self, state: Any, forward: Forward, block: BlockPosition, streams: Streams, proceed):
        raise _Reached(streams[0])


def tokens_of(forward: Forward, latent: torch.Tensor) -> torch.Tensor:
    """latent [b, C, h, w] -> [b, L, D]: the model's own tokens with their places, from a call of it that ends before its
    first block."""
    run, stop = forward.run, _Stop(None)
    alone = Run((stop,), run.clock, run.model, {}, run.arch, {stop: None})
    text = latent.new_zeros(latent.shape[0], 1, forward.diffusion_model.y_embedder.y_embedding.shape[-1])
    before = current_forward.set(Forward(alone, (), {}))
    try:
        forward.diffusion_model(latent, latent.new_zeros(latent.shape[0]), context=text)
    except _Reached as reached:
        return reached.args[0]
    finally:
        current_forward.reset(before)
    raise RuntimeError("PixArt ran without its first block; another node has exchanged it.")


def of_image(model, vae, image: torch.Tensor) -> Condition:
    """An image [b, H, W, C], resized to the noise (the middle of it, where its shape is another) and encoded."""
    if vae is None:
        raise ValueError(
            "Apply RelaCtrl needs a VAE to encode its image with. Connect PixArt-alpha's (that of SD 1.5)."
        )

    def condition(shape: tuple[int, ...]) -> torch.Tensor:
        cell = vae.spacial_compression_encode()
        height, width = shape[-2] * cell, shape[-1] * cell
        pixels = rgb(image).movedim(-1, 1)
        if pixels.shape[2:] != (height, width):
            way = "area" if pixels.shape[2] > height or pixels.shape[3] > width else "bilinear"
            pixels = comfy.utils.common_upscale(pixels, width, height, way, "center")
        return fitting(encode(model, vae, pixels.movedim(1, -1), NAME), shape)

    return condition


def of_latent(model, samples: torch.Tensor) -> Condition:
    latent = to_model(model, samples, NAME)
    return lambda shape: fitting(latent, shape)


def fitting(latent: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if latent.shape[-2:] != tuple(shape[-2:]):
        size, wanted = (f"{s[-1]} x {s[-2]}" for s in (latent.shape, shape))
        raise ValueError(
            f"{NAME} got a latent of {size} cells, and the noise has {wanted}. Resize the image to the picture's size, or "
            "connect it with its VAE, which does so."
        )
    return latent


def load(path: str | Path) -> RelaCtrl:
    """The control blocks of a file. ValueError, one sentence, where it is not one of RelaCtrl's."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path.name} is no safetensors file: {CONVERTER}, as the file's release is one of torch.save."
        )
    tensors, _ = read_weights(path, "download it again from qihoo360/RelaCtrl")
    return read(tensors, path.name)


def apply(model, control: RelaCtrl, node: str | None, image=None, vae=None, latent=None, **settings: Any):
    """A clone of the MODEL under control of an image [b, H, W, C] and its VAE, or of a LATENT. settings: fields of
    RelaCtrlFeature. ValueError, one sentence, where they do not go together."""
    if (image is None) == (latent is None):
        given = "both" if latent is not None else "neither"
        raise ValueError(f"{NAME} takes an image with its VAE or a latent, and got {given}. Connect one of them.")
    feature = RelaCtrlFeature(node, control=control, **settings)
    diffusion_model = model.model.diffusion_model
    arch = archs.find(diffusion_model)
    feature.check_arch(arch, archs.class_name(diffusion_model))
    feature.check_model(arch, diffusion_model)
    condition = of_latent(model, latent["samples"]) if image is None else of_image(model, vae, image)
    return attach(model, replace(feature, condition=condition))
