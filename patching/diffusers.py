"""The other way round: our attention and cache methods on a pipeline of diffusers in a script, without ComfyUI.

    applied = apply(pipe, attention=Window3D(8, 16, 16), cache=Cache(interval=3))
    pipe(prompt)
    print(applied.facts)
    remove(pipe)

Steps are counted by the scheduler, and what a run keeps is gone when the pipeline's call ends, however it ends. A bare
transformer has no call that ends: there `with applied.running(scheduler):` stands around the loop."""

import functools
import inspect
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch

from .. import archs
from ..methods.attention.call import AttentionMethod
from ..methods.cache.taylor import allowed_order
from .diffusers_processors import restore, serve
from .diffusers_run import Place, Run, attend, called, current
from .diffusers_streams import OURS, RETURNS

PARTS = ("transformer", "transformer_2")  # Wan 2.2 has one for the noisy steps and one for the others
LEVELS = ("last_block", "output")
ON = "_tessera_applied"


@dataclass(frozen=True)
class Cache:
    """One evaluation in `interval` is computed, after `warmup` ones and in the `tail_full` last steps; others are forecast
    by Taylor Cache's forecast of that order. level: last_block forecasts what the stack of blocks gives, output what
    the transformer gives."""

    interval: int = 3
    order: int = 1
    warmup: int = 3
    tail_full: int = 1
    level: str = "last_block"
    basis: str = "taylor_paper"

    def __post_init__(self):
        if self.level not in LEVELS:
            raise ValueError(f"Unknown level {self.level!r}. Use {' or '.join(LEVELS)}.")
        allowed_order(self.basis, self.order, self.interval)


@dataclass(frozen=True)
class Plan:
    """Attention methods, the last one asked first, and the calls that they are offered."""

    methods: tuple[AttentionMethod, ...] = ()
    min_tokens: int = 4096
    blocks: frozenset[int] | None = None  # numbers in the stack; None: all
    dense_steps: tuple[int, int] = (0, 0)  # at the start and at the end


@dataclass
class Part:
    """One transformer."""

    model: torch.nn.Module
    arch: archs.Arch
    places: tuple[Place, ...]
    run: Run | None = None  # while the pipeline works


@dataclass
class Applied:
    """What `apply` put on a pipeline or a transformer. facts: of the newest run, one entry a transformer."""

    parts: list[Part]
    plan: Plan
    cache: Cache | None
    facts: list[dict[str, Any]] = field(default_factory=list)
    undo: list[Any] = field(default_factory=list)

    @contextmanager
    def running(self, scheduler: Any):
        """A run over that scheduler's timesteps: its `step` counts, and all that the run kept is dropped at the end."""
        if any(part.run is not None for part in self.parts):
            raise RuntimeError("This pipeline is running already. Apply to one pipeline for each thread.")
        own, plain = scheduler.__dict__.get("step"), scheduler.step

        @functools.wraps(plain)
        def step(*args, **kwargs):
            out = plain(*args, **kwargs)
            for part in self.parts:
                if part.run is not None:
                    part.run.stepped()
            return out

        scheduler.step = step
        for part in self.parts:
            part.run = Run(part.arch, part.model, scheduler, self.plan, self.cache)
        try:
            yield self
        finally:
            if own is None:
                del scheduler.step
            else:
                scheduler.step = own
            runs = [part.run for part in self.parts if part.run is not None]
            for part in self.parts:
                part.run = None
            self.facts = [run.close() for run in runs]


def apply(
    pipe: Any,
    attention: AttentionMethod | Sequence[AttentionMethod] = (),
    cache: Cache | None = None,
    min_tokens: int = 4096,
    blocks: Sequence[int] | None = None,
    dense_steps: tuple[int, int] = (0, 0),
) -> Applied:
    """Puts methods of tessera.methods.attention and a cache on a pipeline, or on a transformer alone. ValueError where its
    class is unknown or cannot be served."""
    methods = tuple(attention) if isinstance(attention, list | tuple) else (attention,)
    plan = Plan(methods, min_tokens, None if blocks is None else frozenset(blocks), dense_steps)
    models = [pipe] if isinstance(pipe, torch.nn.Module) else [getattr(pipe, name, None) for name in PARTS]
    parts = [_part(model, plan, cache) for model in models if model is not None]
    if not parts:
        raise ValueError(f"{type(pipe).__name__} has no transformer. Give a pipeline that has one, or the transformer.")
    if any(ON in part.model.__dict__ for part in parts):
        raise ValueError("Methods are on this pipeline already. Call remove(pipe) first.")
    applied = Applied(parts, plan, cache)
    for part in parts:
        _hook(part, applied)
    if not isinstance(pipe, torch.nn.Module):
        _around_calls(pipe, applied)
    return applied


def remove(pipe: Any) -> None:
    """Takes all of it off again. Nothing where nothing is on."""
    applied = getattr(pipe, ON, None)
    if applied is None:
        return
    for undo in reversed(applied.undo):
        undo()
    applied.undo.clear()


def _part(model: torch.nn.Module, plan: Plan, cache: Cache | None) -> Part:
    """ValueError where a method or the cache cannot serve this class."""
    arch = archs.all_archs().get(("diffusers", type(model).__name__))
    if arch is None:
        known = ", ".join(sorted(name for home, name in archs.all_archs() if home == "diffusers"))
        raise ValueError(f"The tokens and blocks of {type(model).__name__} are not known. Known are {known}.")
    if plan.methods and "attention" in arch.limits:
        raise ValueError(f"Attention methods cannot act on {arch.name}: {arch.limits['attention']}")
    if cache is not None and cache.level == "last_block" and "blocks" in arch.limits:
        raise ValueError(f"{arch.name}: {arch.limits['blocks']} Use Cache(level='output').")
    stack = [spec for spec in arch.blocks if spec.stack]
    found = [(spec, i) for spec in stack for i, _ in enumerate(archs.block_modules(model, spec))]
    places = tuple(Place(spec, i, number, len(found)) for number, (spec, i) in enumerate(found))
    beyond = sorted(n for n in plan.blocks or () if n >= len(places))
    if beyond:
        raise ValueError(f"This {arch.name} has blocks 0 to {len(places) - 1}, there is no block {beyond[0]}.")
    chosen = {p.number for p in places if plan.blocks is None or p.number in plan.blocks}
    for method in plan.methods:
        check = getattr(method, "check", None)
        if check is not None:
            check(arch, places, chosen)
    return Part(model, arch, places)


def _hook(part: Part, applied: Applied) -> None:
    """Stands around the transformer, its blocks and its attention processors; inert outside a run."""
    model, undo = part.model, applied.undo
    model.__dict__[ON] = applied
    undo.append(lambda: model.__dict__.pop(ON))
    _exchange(model, lambda plain: lambda _, *args, **kwargs: called(part, plain, args, kwargs), undo)
    for place in part.places:
        _, block = archs.block_modules(model, place.spec)[place.index]
        names, returns = tuple(inspect.signature(type(block).forward).parameters)[1:], RETURNS[type(block).__name__]
        _exchange(block, functools.partial(_of_block, place=place, returns=returns, names=names), undo)
    if applied.plan.methods:
        serve(model, attend)
        undo.append(functools.partial(restore, model))


def _exchange(module: torch.nn.Module, made, undo: list[Any]) -> None:
    """Another forward for one module; what stood there, also another's hook, is called by it and comes back."""
    own, plain = module.__dict__.get("forward"), module.forward
    module.forward = MethodType(functools.wraps(plain)(made(plain)), module)

    def back() -> None:
        if own is None:
            del module.forward
        else:
            module.forward = own

    undo.append(back)


def _of_block(plain, place: Place, returns: tuple[str, ...], names: tuple[str, ...]):
    """The forward of a block: its own, or in a skipped evaluation what is forecast of it."""

    def forward(_, *args, **kwargs):
        call = current.get()
        if call is None:
            return plain(*args, **kwargs)
        if not call.skips:
            before, call.block = call.block, place
            try:
                out = plain(*args, **kwargs)
            finally:
                call.block = before
            call.run.computed += 1
            if place.number == place.count - 1:
                call.store(out if isinstance(out, tuple) else (out,))
            return out
        call.run.skipped += 1
        if place.number == place.count - 1:
            made = call.forecast()
        else:
            given = {OURS.get(n, n): v for n, v in [*zip(names, args, strict=False), *kwargs.items()]}
            made = tuple(given[name] for name in returns)
        return made[0] if len(made) == 1 else made

    return forward


def _around_calls(pipe: Any, applied: Applied) -> None:
    """Every call of the pipeline becomes a run: its class is exchanged for one derived from it."""
    kind = type(pipe)

    @functools.wraps(kind.__call__)
    def call(self, *args, **kwargs):
        with applied.running(self.scheduler):
            return kind.__call__(self, *args, **kwargs)

    pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__, ON: applied})
    applied.undo.append(lambda: setattr(pipe, "__class__", kind))
