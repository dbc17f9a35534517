"""One call of the diffusion model: whose rows it carries, where its image tokens sit, and which hooks act in it."""

from dataclasses import dataclass, field
from typing import Any

import torch

from .. import archs
from . import attention, blocks
from .run import RUN, Feature, Run, current_forward, find_options, replace_options

FORWARD = "tessera_forward"


@dataclass(frozen=True)
class StreamKey:
    """Who a chunk of rows belongs to. Rows move between calls (joined or separate CFG, free memory); keys do not."""

    role: int  # 0 positive, 1 negative, as in cond_or_uncond: core copies a positive's uuid into the negative list
    uuid: Any
    window: tuple[int, ...] | None  # frames of a context window
    shape: tuple[int, ...]
    device: str
    occurrence: int  # the same condition used twice in one evaluation


@dataclass(frozen=True)
class Part:
    """Of a picture."""

    rows: slice
    columns: slice
    sides: tuple[int, int]  # of the whole latent, or of the area that a prompt is for

    def of(self, latent: torch.Tensor) -> torch.Tensor:
        """latent [..., H, W] with these sides -> this part of it."""
        return latent[..., self.rows, self.columns]


@dataclass
class Forward:
    """Lives for one call of the diffusion model."""

    run: Run
    keys: tuple[StreamKey, ...]
    options: dict[str, Any]
    x: Any = None  # what the diffusion model received
    grid: tuple[int, int, int] | None = None
    diffusion_model: Any = None
    arguments: dict[str, Any] = field(default_factory=dict)  # what the block being entered was given, by name
    given: dict[str, Any] = field(default_factory=dict)  # what the block being computed gets in place of its arguments
    control: Any = None  # residuals of ControlNets for this call, lists by name
    obscured: bool = False  # a condition of this call makes the token layout unknown
    block: Any = None  # the BlockPosition being computed, where hooks tell
    override: Any = None  # the attention dispatcher, where it is ComfyUI's override
    dispatch: Any = None  # the same, for modules that no override reaches
    asked: bool = False  # whether attention came to it
    passed_on: bool = False  # whether it is asking another pack's override
    rotation: Any = None  # the RoPE table that the model told last, where a plan asked for it
    told: Any = None  # told (module, output) of the block being computed, where someone keeps them
    outputs: Any = None  # module -> its output for the block being entered, where they are known already
    calls: dict[Any, int] = field(default_factory=dict)  # attention calls met, by block

    timestep: torch.Tensor | None = None  # what the diffusion model was given, where it has a wrapper
    inputs: dict[str, Any] = field(default_factory=dict)  # all that it was given, by name, where it has a wrapper
    appended: int = 0  # tokens that a feature has put behind the image's, as queries and keys of self-attention
    extra_keys: list[Any] = field(default_factory=list)  # ExtraKeys behind those of every call in the stack
    part: Part | None = None  # of the picture that this call computes; None: all
    held: dict[Any, Any] = field(default_factory=dict)  # what features keep for this call, by feature
    covered: tuple[int, int, int] | None = None  # tokens that the image's positions reach over, where they were moved
    before: int = 0  # frames whose keys stand before the image's in self-attention of the stack

    def see(self, diffusion_model: Any, x: Any) -> None:
        """The tensor that reaches the diffusion model fixes the token grid."""
        self.diffusion_model, self.x = diffusion_model, x
        arch = self.run.arch
        if arch is not None and not self.obscured and isinstance(x, torch.Tensor | list | tuple):
            self.grid = arch.grid(diffusion_model, x)

    def modulated(self) -> torch.Tensor | None:
        """The first stream's rows of the first condition under the modulation of the block being entered; None where the
        family does not tell."""
        arch, told = self.run.arch, {**self.arguments, "model_timestep": self.timestep}
        made = arch.modulated(self.diffusion_model, told) if arch is not None and arch.modulated else None
        return made if made is None or made.shape[0] % len(self.keys) else made.chunk(len(self.keys))[0]

    def rows(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """The tensor cut into one chunk a stream along its batch, or None where it cannot be."""
        count = len(self.keys)
        return list(tensor.chunk(count)) if tensor.shape[0] % count == 0 else None


class ModelFeature(Feature):
    """A feature that may answer in place of the whole model."""

    def around_model(self, state: Any, forward: Forward, x: torch.Tensor, sigma: torch.Tensor, proceed):
        """proceed() computes the denoised prediction [B, ...]; return it or a replacement."""
        return proceed()


class NetworkFeature(Feature):
    """A feature that prepares a call of the network itself, where the architecture has the DIFFUSION_MODEL wrapper."""

    def before_network(self, state: Any, forward: Forward, options: dict[str, Any]) -> dict[str, Any]:
        """forward.inputs hold what the network is given by name, as other packs' wrappers left it -> the
        transformer_options that it gets in place of `options`, which stay as they are."""
        return options

    def other_inputs(self, state: Any, forward: Forward) -> dict[str, Any]:
        """Arguments, by name, that the network is given in place of those in forward.inputs."""
        return {}


class PartFeature(Feature):
    """A feature that may compute a call of the diffusion model part by part."""

    def in_parts(self, state: Any, args: Any, kwargs: dict[str, Any], compute) -> torch.Tensor:
        """What apply_model gives for these arguments. compute(args, kwargs, part) is a call of its own, with its own
        tokens and stream keys, of that Part of the picture, None for all of it."""
        return compute(args, kwargs, None)


def apply_model(executor, *args, **kwargs):
    """APPLY_MODEL wrapper: one call of the diffusion model, or several."""
    options = find_options(args, kwargs)
    run = options.get(RUN)
    if run is None:
        return executor(*args, **kwargs)

    def compute(args, kwargs, part):
        return _call(executor, run, options.copy(), args, kwargs, part)

    for feature in run.acting:
        if isinstance(feature, PartFeature):
            return feature.in_parts(run.states[feature], args, kwargs, compute)
    return compute(args, kwargs, None)


def _call(executor, run: Run, options: dict[str, Any], args, kwargs, part):
    """Opens a Forward, installs the hooks of this run, closes it."""
    x, sigma = args[0], args[1]
    forward = Forward(run, stream_keys(run, options, x), options, part=part)
    options[FORWARD] = forward
    forward.diffusion_model = executor.class_obj.diffusion_model
    forward.control = args[4] if len(args) > 4 else kwargs.get("control")  # x, t, c_concat, c_crossattn, control
    forward.obscured = run.arch is not None and archs.obscured(run.arch, kwargs) is not None
    if run.arch is not None and not run.arch.wrapper:
        forward.see(forward.diffusion_model, x)
    attention.install(forward, options)
    blocks.install(forward, options)
    args, kwargs = replace_options(args, kwargs, options)
    token = current_forward.set(forward)
    try:
        proceed = lambda: executor(*args, **kwargs)  # noqa: E731
        for feature in run.acting:
            if isinstance(feature, ModelFeature):
                proceed = _around(feature, forward, x, sigma, proceed)
        run.forwards += 1
        return proceed()
    finally:
        run.asked += forward.asked
        current_forward.reset(token)


def _around(feature, forward, x, sigma, proceed):
    return lambda: feature.around_model(forward.run.states[feature], forward, x, sigma, proceed)


def diffusion_model(executor, *args, **kwargs):
    """DIFFUSION_MODEL wrapper, where the architecture has one: sees the tensor after concatenated conditions, and what other
    packs' wrappers made of the options."""
    options = find_options(args, kwargs)
    forward = options.get(FORWARD)
    if forward is not None:
        forward.see(executor.class_obj, args[0] if args else kwargs.get("x"))
        forward.timestep = args[1] if len(args) > 1 else kwargs.get("timestep")
        names = blocks.argument_names(executor.original)
        forward.inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        options = attention.above(forward, options)
        for feature in forward.run.acting:
            if isinstance(feature, NetworkFeature):
                args, kwargs = _given(
                    forward, feature.other_inputs(forward.run.states[feature], forward), names, args, kwargs
                )
                options = feature.before_network(forward.run.states[feature], forward, options)
        args, kwargs = replace_options(args, kwargs, options)
    return executor(*args, **kwargs)


def _given(forward: Forward, other: dict[str, Any], names: tuple[str, ...], args, kwargs):
    """(args, kwargs) of the network with these arguments in place of its own."""
    forward.inputs.update(other)
    forward.timestep = other.get("timestep", forward.timestep)
    args = [other.get(name, value) for name, value in zip(names, args, strict=False)] + list(args[len(names) :])
    return args, {**kwargs, **{name: value for name, value in other.items() if name not in names[: len(args)]}}


def stream_keys(run: Run, options: dict[str, Any], x: torch.Tensor) -> tuple[StreamKey, ...]:
    roles = options.get("cond_or_uncond") or [0]
    uuids = options.get("uuids") or [None] * len(roles)
    window = getattr(options.get("context_window"), "index_list", None)
    window = tuple(window) if window is not None else None
    shape = (x.shape[0] // len(roles), *x.shape[1:])
    keys = []
    for role, uuid in zip(roles, uuids, strict=True):
        base = (role, uuid, window, shape, str(x.device))
        run.seen[base] = run.seen.get(base, -1) + 1
        keys.append(StreamKey(*base, run.seen[base]))
    return tuple(keys)
