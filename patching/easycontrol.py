"""EasyControl on a stock FLUX.1: a condition whose keys and values the picture attends to, computed once a run."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..methods.control.easycontrol import EasyControlWeights, fits
from ..methods.control.held_keys import Held, hold
from .attention_around import KeyFeature
from .control import ControlFeature
from .easycontrol_pass import Key, appending, keys_and_values, positions_of
from .extra_keys import ExtraKeys
from .forward import Forward, NetworkFeature, StreamKey
from .panels import PanelFeature
from .run import Feature

NAME = "Apply EasyControl"
CACHES, DTYPES = ("step_invariant", "recompute"), ("auto", "fp8_e4m3")


@dataclass
class Kept:
    """Keys and values of one stream, and what they were made with: its y and guidance, the LoRA hooks of its prompt with
    their strengths."""

    pairs: dict[Key, tuple[Held, Held]]
    inputs: dict[str, torch.Tensor]
    hooks: tuple[Any, ...]

    def fits(self, inputs: dict[str, torch.Tensor], hooks: tuple[Any, ...]) -> bool:
        """Hooks may follow keyframes, and other packs' wrappers may change inputs between steps."""
        same = self.hooks == hooks and self.inputs.keys() == inputs.keys()
        return same and all(torch.equal(self.inputs[name], inputs[name]) for name in inputs)


@dataclass
class EasyControlState:
    """One run."""

    held: dict[Any, Kept] = field(default_factory=dict)  # by stream
    rotations: dict[Any, torch.Tensor] = field(
        default_factory=dict
    )  # of the condition's tokens, by size of the picture
    calls: Counter = field(default_factory=Counter)  # calls of the network: "served", "passes", "idle"
    tokens: int = 0  # condition tokens of one picture
    computed: int = 0  # condition tokens that went through the blocks, summed over rows
    bytes: int = 0  # held, at most
    sizes: tuple[int, int, int] = (0, 0, 0)  # of one row: text and picture tokens, width, blocks


@dataclass(frozen=True, eq=False)
class EasyControlFeature(ControlFeature, NetworkFeature):
    """One condition. latent [b, C, h, w] as the model sees it."""

    adds_keys: ClassVar[bool] = True
    weights: EasyControlWeights | None = None
    latent: torch.Tensor | None = None
    subject: bool = False
    lora_scale: float = 1.0
    cache: str = "step_invariant"
    kv_dtype: str = "auto"

    def check_arch(self, arch, class_name: str) -> None:
        if arch is None or arch.name != "Flux":
            raise ValueError(
                f"{self.name} works on FLUX.1, and this MODEL is {arch.name if arch else class_name}. Load FLUX.1-dev."
            )

    def check_model(self, arch, diffusion_model) -> None:
        if diffusion_model.params.global_modulation:
            raise ValueError(f"{self.name} works on FLUX.1, and this MODEL is FLUX.2. Load FLUX.1-dev.")
        sizes = len(diffusion_model.double_blocks), len(diffusion_model.single_blocks), diffusion_model.hidden_size
        fits(self.weights, *sizes)
        self._takes(diffusion_model.params.in_channels)

    def _takes(self, channels: int) -> None:
        """ValueError where the network is given more than the latent."""
        own = self.condition().shape[1]
        if channels != own:
            raise ValueError(
                f"{self.name} has a condition of {own} channels, and this MODEL takes {channels}: FLUX.1 Fill, Canny or Depth, or "
                "one of their LoRA. Use FLUX.1-dev without them."
            )

    def conflicts(self, other: Feature) -> str | None:
        if isinstance(other, KeyFeature):
            return f"{self.name} and {other.name} both change what the blocks attend to. Use one of them on a MODEL."
        if isinstance(other, PanelFeature):
            return f"{other.name} moves the picture's positions, to which {self.name} fits its condition. Use one of them on a MODEL."
        return None

    def begin(self, run) -> EasyControlState:
        return EasyControlState()

    def condition(self) -> torch.Tensor:
        """[b, C, h, w]."""
        return self.latent

    def before_network(self, state: EasyControlState, forward: Forward, options: dict[str, Any]) -> dict[str, Any]:
        if not self.acts(forward.run):
            state.calls["idle"] += 1
            return options
        self._takes(forward.x.shape[1])
        rotations = self._rotations(state, forward, options)
        held = [self._held(state, forward, i, rotations) for i in range(len(forward.keys))]
        rows, log_strength = forward.x.shape[0], math.log(self.strength)
        patch = appending(forward, lambda key: _rows([entry[key] for entry in held], rows, forward.x), rotations)
        forward.extra_keys.append(ExtraKeys(rotations.shape[2], log_strength))
        state.calls["served"] += 1
        self._note(state, forward, rotations.shape[2])
        patches = options.get("patches", {})
        chain = [*patches.get("attn1_patch", ()), patch]  # other packs' patches see the picture's own keys
        return {**options, "patches": {**patches, "attn1_patch": chain}}

    def _rotations(self, state: EasyControlState, forward: Forward, options: dict[str, Any]) -> torch.Tensor:
        """Of the condition's tokens [1, 1, Nc, D / 2, 2, 2], by the embedder that the picture has in this run."""
        x, network = forward.x, forward.diffusion_model
        key = (x.shape[-2:], str(x.device))
        if key not in state.rotations:
            height, width = (-(-side // network.patch_size) for side in self.condition().shape[-2:])
            places = positions_of(network, torch.empty(1, *x.shape[1:]), options)
            state.rotations[key] = network.pe_embedder(places.ids(height, width, self.subject).to(x.device))
        return state.rotations[key]

    def _held(self, state: EasyControlState, forward: Forward, number: int, rotations: torch.Tensor):
        """Keys and values for one stream, from the run's cache where they are."""
        pictures = forward.x.shape[0] // len(forward.keys)
        at = slice(number * pictures, (number + 1) * pictures)
        given = {n: t[at] for n, t in forward.inputs.items() if isinstance(t, torch.Tensor) and n in INPUTS}
        if self.cache == "recompute":
            return self._compute(state, forward, given, rotations)
        told, hooks = {n: t for n, t in given.items() if n in TOLD}, _hooks(forward.run)
        stream = _identity(forward.keys[number], _members(forward, pictures) if len(self.condition()) > 1 else None)
        if stream not in state.held or not state.held[stream].fits(told, hooks):
            state.held.pop(stream, None)
            made = self._compute(state, forward, given, rotations)
            state.held[stream] = Kept(made, told, hooks)
            held = [pair for kept in state.held.values() for pair in kept.pairs.values()]
            state.bytes = max(state.bytes, sum(part.bytes for pair in held for part in pair))
        return state.held[stream].pairs

    def _compute(
        self, state: EasyControlState, forward: Forward, given: dict[str, torch.Tensor], rotations: torch.Tensor
    ):
        """For the rows of one stream; given: what the network gets for them."""
        latent = self.condition()
        alike = all(bool((t == t[:1]).all()) for n, t in given.items() if n in TOLD)
        if latent.shape[0] == 1 and alike:
            given = {n: t[:1] for n, t in given.items()}
        else:
            latent = latent[[i % len(latent) for i in _members(forward, len(given["context"]))]]
        latent = latent.to(forward.x)
        made = keys_and_values(forward.diffusion_model, latent, given, rotations, self.weights, self.lora_scale)
        state.calls["passes"] += 1
        state.computed += latent.shape[0] * rotations.shape[2]
        return {key: (hold(k, self.kv_dtype), hold(v, self.kv_dtype)) for key, (k, v) in made.items()}

    def _note(self, state: EasyControlState, forward: Forward, tokens: int) -> None:
        network = forward.diffusion_model
        blocks = len(network.double_blocks) + len(network.single_blocks)
        picture = math.prod(forward.grid or (0, 0, 0)) + forward.inputs["context"].shape[1]
        state.tokens, state.sizes = tokens, (picture, network.hidden_size, blocks)

    def held_bytes(self, run, noise_shape: tuple[int, ...], conds: dict[str, Any]) -> int:
        network = run.model.diffusion_model
        latent = self.condition()
        tokens = math.prod(-(-side // network.patch_size) for side in latent.shape[-2:])
        rows = sum(len(part) for part in conds.values()) * (1 if latent.shape[0] == 1 else noise_shape[0])
        blocks = len(network.double_blocks) + len(network.single_blocks)
        size = 1 if self.kv_dtype == "fp8_e4m3" else run.dtype.itemsize
        return 2 * rows * tokens * blocks * network.hidden_size * size if self.strength else 0

    def facts(self, state: EasyControlState) -> dict[str, Any]:
        return {
            "condition_tokens": state.tokens,
            "served": state.calls["served"],
            "idle": state.calls["idle"],
            "passes": state.calls["passes"],
            "condition_tokens_computed": state.computed,
            "bytes": state.bytes,
            "flops_ratio": round(flops_ratio(*state.sizes[:2], state.tokens), 4) if state.tokens else 1.0,
        }

    def line(self, facts: dict[str, Any]) -> str:
        if not facts:
            return ""
        if not facts["served"]:
            return "strength 0 or outside of its steps: the plain MODEL"
        told = f"{facts['condition_tokens']:,} condition tokens, {facts['passes']} passes for {facts['served']} calls, "
        told += f"{facts['bytes'] / 1e6:,.1f} MB held"
        if self.cache == "step_invariant":
            told += f"; {facts['flops_ratio']:.2f} times fewer FLOPs a step than with the condition in it"
        return told


TOLD = ("y", "guidance")  # what the condition's pass depends on
INPUTS = ("context", *TOLD, "timestep")


def _identity(stream: StreamKey, members: tuple[int, ...] | None) -> Any:
    """Whose rows these are; the same condition met twice in an evaluation has the same prompt."""
    return stream.role, stream.uuid, stream.shape, stream.device, members


def _members(forward: Forward, pictures: int) -> tuple[int, ...]:
    """Which pictures of the batch a call computes: core's context windows may cut the batch."""
    window = forward.options.get("context_window")
    if getattr(window, "dim", None) != 0:
        return tuple(range(pictures))
    anchor = getattr(window, "causal_anchor_index", None)
    found = (*((anchor,) if anchor is not None and anchor >= 0 else ()), *window.index_list)
    return found if len(found) == pictures else tuple(range(pictures))


def _hooks(run: Any) -> tuple[Any, ...]:
    """Core's LoRA hooks that are on the weights now; a keyframe changes their strength between steps."""
    group = getattr(getattr(run.model, "current_patcher", None), "current_hooks", None)
    return tuple((hook.hook_ref, hook.strength) for hook in group.hooks) if group else ()


def _rows(pairs: list[tuple[Held, Held]], rows: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One pair a stream -> k and v [rows, H, Nc, D]."""
    pictures = rows // len(pairs)
    k, v = (torch.cat([pair[i].tensor().expand(pictures, -1, -1, -1) for pair in pairs]) for i in range(2))
    return k.to(like.device), v.to(like.device)


def flops_ratio(picture: int, width: int, condition: int) -> float:
    """FLOPs of a step with the condition's tokens in every block over those of a step that finds their keys: 24 D^2 a token
    for the projections, 4 D a query and key."""
    plain = 24 * width**2 * picture + 4 * width * picture * (picture + condition)
    return 1 + (24 * width**2 * condition + 4 * width * condition**2) / plain
