"""One block stack for every architecture: the same call whether a model offers patches_replace["dit"] or its blocks'
forward has to be wrapped. Features see each block as a function from residual streams to residual streams."""

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .. import archs
from . import timeline
from .forwards import StandIn, exchange, standing
from .run import RUN, Feature, current_forward

Streams = tuple[Any, ...]  # tensors, or tuples of tensors (video and audio), in the order of Blocks.streams


@dataclass(frozen=True)
class BlockPosition:
    """A block's place in the residual stack."""

    spec: archs.Blocks
    index: int  # within its list
    number: int  # within the whole stack, 0..count-1
    count: int

    @property
    def last(self) -> bool:
        return self.number == self.count - 1


class BlockFeature(Feature):
    """A feature that may answer in place of blocks.

    inner: it computes a block in another way, so it stands inside those that may answer in its place."""

    inner: ClassVar[bool] = False

    def around_block(self, state: Any, forward: Any, block: BlockPosition, streams: Streams, proceed) -> Streams:
        """proceed(streams) computes the block. Clone what is kept: core writes into returned tensors."""
        return proceed(streams)


def positions(arch: archs.Arch, diffusion_model: Any) -> list[BlockPosition]:
    """The residual stack of a model, in running order."""
    found = [(spec, i) for spec in arch.blocks if spec.stack for i in range(len(_list(diffusion_model, spec)))]
    return [BlockPosition(spec, i, n, len(found)) for n, (spec, i) in enumerate(found)]


def _list(diffusion_model: Any, spec: archs.Blocks) -> list[Any]:
    owner = diffusion_model
    for part in spec.path.split("."):
        owner = getattr(owner, part)
    return list(owner.values()) if isinstance(owner, torch.nn.ModuleDict) else list(owner)


def block_path(diffusion_model: Any, spec: archs.Blocks, index: int) -> str:
    """Dotted path of a block below the BaseModel."""
    owner = diffusion_model
    for part in spec.path.split("."):
        owner = getattr(owner, part)
    key = list(owner)[index] if isinstance(owner, torch.nn.ModuleDict) else str(index)
    return f"diffusion_model.{spec.path}.{key}"


def around(forward, block: BlockPosition, streams: Streams, compute) -> Streams:
    """Runs one block through every block feature of the run: inner ones inside, else the newest outermost."""
    ran = []

    def proceed(values):
        ran.append(forward.outputs is None)  # else a cache knows what its modules give
        return compute(values)

    features = [f for f in forward.run.acting if isinstance(f, BlockFeature)]
    for feature in sorted(features, key=lambda f: not f.inner):
        proceed = _layer(feature, forward, block, proceed)
    before, forward.block = forward.block, block
    try:
        out = proceed(streams)
        if features and not torch.compiler.is_compiling():
            _note(forward, block, ran, streams, out)
        return out
    finally:
        forward.block = before


def _note(forward, block: BlockPosition, ran: list[bool], given: Streams, out: Streams) -> None:
    passed = not ran and all(a is b for a, b in zip(given, out, strict=False))
    letter = timeline.COMPUTED if any(ran) else timeline.PASSED if passed else timeline.FILLED
    forward.run.timeline.block(forward.run.clock.evaluation, block, letter)


def _layer(feature, forward, block, proceed):
    return lambda streams: feature.around_block(forward.run.states[feature], forward, block, streams, proceed)


def needed(forward) -> bool:
    """Do this run's features need to be asked at blocks?"""
    from .attention import AttentionFeature
    from .attention_around import AroundAttention

    arch = forward.run.arch
    asks = any(isinstance(f, BlockFeature) for f in forward.run.features)
    tells = arch.indexed and all(spec.replace is not None for spec in arch.blocks if spec.stack)
    told = AttentionFeature | AroundAttention
    counts = not tells and any(isinstance(f, told) or f.adds_keys for f in forward.run.features)
    return asks or counts


def install(forward, options: dict[str, Any]) -> None:
    """Puts a replace hook on every block of this call, in front of whatever hook was there."""
    arch = forward.run.arch
    if arch is None or not needed(forward):
        return
    replace = {**options.get("patches_replace", {})}
    hooks = {**replace.get("dit", {})}
    for block in positions(arch, forward.diffusion_model):
        if block.spec.replace is not None:
            key = (block.spec.replace, block.index)
            hooks[key] = eager(_replace_hook(forward, block, hooks.get(key)), options)
    if hooks:
        options["patches_replace"] = {**replace, "dit": hooks}


def eager(hook, options: dict[str, Any]):
    """Under torch.compile, by core's node or as object patches, a hook whose decisions change between steps must stay out
    of the graph."""
    compiled = getattr(options.get(RUN), "compiled", False)
    compiled = compiled or any("torch.compile" in keys for keys in options.get("wrappers", {}).values())
    return torch.compiler.disable(hook) if compiled else hook


def _replace_hook(forward, block: BlockPosition, earlier):
    names = block.spec.streams

    def hook(args, extra, *rest, **unknown):
        shape: dict[str, Any] = {}
        forward.arguments = args

        def compute(streams):
            given = {name: forward.given.get(name, value) for name, value in args.items()}
            call = {**given, **dict(zip(names, streams, strict=True))}
            out = earlier(call, extra, *rest, **unknown) if earlier is not None else extra["original_block"](call)
            shape.update(out)
            return tuple(out.get(name, call[name]) for name in names)

        result = around(forward, block, tuple(args[name] for name in names), compute)
        return {**shape, **dict(zip(names, result, strict=True))}

    return hook


def argument_names(function) -> tuple[str, ...]:
    """The names of a forward's positional arguments, empty where it hides them."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        return tuple(p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds)
    except (TypeError, ValueError):
        return ()


class WrappedForward(StandIn):
    """Stands in for a block's forward where the architecture offers no replace hook. Inert outside our runs."""

    def __init__(self, original, block: BlockPosition, written=None):
        self.original, self.block = original, block
        self.names = argument_names(written or original)

    def __call__(self, *args, **kwargs):
        forward = current_forward.get()
        if forward is None or not needed(forward):
            return self.original(*args, **kwargs)
        spec = self.block.spec
        places = dict(zip(spec.streams, spec.positions, strict=False))
        streams = tuple(kwargs[n] if n in kwargs else args[places[n]] for n in spec.streams)
        single = []
        told = {**dict(zip(self.names, args, strict=False)), **kwargs}
        forward.arguments = {**told, **dict(zip(spec.streams, streams, strict=True))}
        places = {name: at for at, name in enumerate(self.names[: len(args)])} | places

        def compute(values):
            positional, named = list(args), dict(kwargs)
            given = {name: value for name, value in forward.given.items() if name in told}
            for name, value in [*given.items(), *zip(spec.streams, values, strict=True)]:
                if name in named:
                    named[name] = value
                else:
                    positional[places[name]] = value
            out = self.original(*positional, **named)
            single.append(not isinstance(out, tuple))
            return (out,) if single[-1] else out

        result = around(forward, self.block, streams, compute)
        return result[0] if len(spec.streams) == 1 else tuple(result)


def wrap_forwards(patched) -> None:
    """Object patches for the blocks of this MODEL that have no replace hook; ComfyUI restores them on unload."""
    diffusion_model = patched.get_model_object("diffusion_model")
    arch = archs.find(diffusion_model)
    if arch is None:
        return
    for block in positions(arch, diffusion_model):
        if block.spec.replace is None:
            path = block_path(diffusion_model, block.spec, block.index)
            if not isinstance(standing(patched, f"{path}.forward"), WrappedForward):
                exchange(patched, path, lambda forward, written, at=block: WrappedForward(forward, at, written))
