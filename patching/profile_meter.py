"""Where the time and the arithmetic of a network go: a stack of what is being computed, moved by hooks on its modules and by
ComfyUI's attention override. Every moment belongs to exactly one entry of the stack, so that shares add up by
themselves; what the hooks cost is an entry of its own."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import archs
from .attention import OVERRIDE
from .blocks import positions
from .convention import unpack
from .run import find_options, replace_options

KINDS = ("attention", "linear", "convolution", "norm", "other", "outside", "profiler")
CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


@dataclass
class Cell:
    seconds: float = 0.0
    calls: int = 0
    flops: float = 0.0
    bytes: float = 0.0  # weights and activations that were read and written, each once

    def add(self, other: "Cell") -> "Cell":
        return Cell(*(getattr(self, n) + getattr(other, n) for n in ("seconds", "calls", "flops", "bytes")))


@dataclass
class Meter:
    """wait: returns when the device has done what it was given; None: nothing is timed. weights: bytes of each module's own
    weights by its name, where they differ from what its tensors say."""

    arch: archs.Arch | None
    wait: Callable[[], Any] | None = None
    weights: dict[str, int] = field(default_factory=dict)
    cells: dict[tuple[int, str, int | None], Cell] = field(default_factory=lambda: defaultdict(Cell))
    lengths: Counter = field(default_factory=Counter)  # (queries, keys) of attention calls
    pairs: Counter = field(default_factory=Counter)  # the same, FLOPs
    calls: list[dict[str, Any]] = field(default_factory=list)  # of the network: step, roles, rows
    blocks: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))  # call -> blocks computed in it
    extra: float = 0.0  # FLOPs that no hook told
    evaluations: int = 0  # predictions that the sampler asked for
    step: int = 0
    ends: list[float] = field(default_factory=list)  # of the steps, by a clock of its own; the beginning first
    handles: list[Any] = field(default_factory=list)
    stack: list[tuple[str, int | None]] = field(default_factory=lambda: [("outside", None)])
    last: float = 0.0

    def begin(self) -> None:
        """Starts the time, at the first prediction that is asked."""
        if self.wait is not None and not self.ends:
            self.wait()
            self.last = time.perf_counter()
            self.ends.append(self.last)

    def end_step(self) -> None:
        self._turn()
        if self.wait is not None:
            self.ends.append(time.perf_counter())
        self.step += 1
        self._own()

    @property
    def seconds(self) -> list[float]:
        """Of each step, from outside."""
        return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]

    def enter(self, kind: str, block: int | None = None) -> None:
        self._turn()
        self.stack.append((kind, self.stack[-1][1] if block is None else block))
        self._own()

    def leave(self, flops: float = 0.0, moved: float = 0.0) -> None:
        self._turn()
        kind, block = self.stack.pop()
        cell = self.cells[self.step, kind, block]
        cell.calls, cell.flops, cell.bytes = cell.calls + 1, cell.flops + flops, cell.bytes + moved
        if block is not None and (flops or moved) and self.calls:
            self.blocks[len(self.calls) - 1].add(block)
        self._own()

    def count(self, kind: str, block: int | None, flops: float) -> None:
        """Arithmetic that no hook tells."""
        self.cells[self.step, kind, block].flops += flops
        self.extra += flops

    def _turn(self) -> None:
        """The time since the last turn belongs to what lies on top."""
        if self.wait is not None and self.ends:
            self.wait()
            now = time.perf_counter()
            self.cells[(self.step, *self.stack[-1])].seconds += now - self.last
            self.last = now

    def _own(self) -> None:
        """The time since then was ours."""
        if self.wait is not None and self.ends:
            now = time.perf_counter()
            self.cells[self.step, "profiler", None].seconds += now - self.last
            self.last = now

    def watch(self, network: torch.nn.Module) -> None:
        """Hooks on the network, its blocks and the modules that are told apart; `remove` takes all of them off."""
        if self.handles:
            return
        numbers = {}
        for block in positions(self.arch, network) if self.arch is not None else ():
            numbers[archs.block_modules(network, block.spec)[block.index][1]] = block
        apart = set()  # attention modules whose attention no override reaches
        for module, block in numbers.items():
            self._hook(module, "other", block.number)
            if block.spec.attention:
                apart.add(module.get_submodule(block.spec.attention))
        self._hook(network, "other")
        for name, module in network.named_modules():
            kind = "attention" if module in apart else kind_of(module)
            if kind is not None and module is not network and module not in numbers:
                self._hook(module, kind, name=name)

    def _hook(self, module: torch.nn.Module, kind: str, block: int | None = None, name: str = "") -> None:
        def before(module, args, kwargs):
            self.enter(kind, block)

        def after(module, args, kwargs, out):
            if kind == "attention":
                tokens = next(iter([*args, *kwargs.values()])).shape[1]
                self.lengths[tokens, tokens] += 1
            self.leave(*work(kind, module, args, kwargs, out, self.weights.get(name)))

        self.handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        self.handles.append(module.register_forward_hook(after, with_kwargs=True))

    def remove(self) -> None:
        while self.handles:
            self.handles.pop().remove()

    def attention(self, earlier: Callable | None):
        """An override around the one that was there."""

        def override(func, *args, **kwargs):
            q, k, v, _, _ = unpack(args, kwargs)
            (b, heads, queries, width), keys = q.shape, k.shape[2]
            flops = 2.0 * b * heads * queries * keys * (width + v.shape[-1])
            self.enter("attention")
            try:
                return self.answer(earlier, func, args, kwargs)
            finally:
                self.lengths[queries, keys] += 1
                self.pairs[queries, keys] += flops
                self.leave(flops, sum(t.nbytes for t in (q, q, k, v)))

        override.meter = self
        return override

    def answer(self, earlier, func, args, kwargs):
        return func(*args, **kwargs) if earlier is None else earlier(func, *args, **kwargs)

    def predict_noise(self, executor, *args, **kwargs):
        """PREDICT_NOISE wrapper."""
        self.begin()
        self.evaluations += 1
        return executor(*args, **kwargs)

    def apply_model(self, executor, *args, **kwargs):
        """APPLY_MODEL wrapper, the innermost one: the MODEL with its object patches is loaded now."""
        options = find_options(args, kwargs)
        self.watch(executor.class_obj.diffusion_model)
        self.calls.append(
            {"step": self.step, "roles": [*options.get("cond_or_uncond", ())], "rows": int(args[0].shape[0])}
        )
        if self.arch is None or not self.arch.wrapper:
            args, kwargs = replace_options(args, kwargs, self._over(options))
        return executor(*args, **kwargs)

    def diffusion_model(self, executor, *args, **kwargs):
        """DIFFUSION_MODEL wrapper, the innermost one: sees the override that is asked first."""
        args, kwargs = replace_options(args, kwargs, self._over(find_options(args, kwargs)))
        return executor(*args, **kwargs)

    def _over(self, options: dict[str, Any]) -> dict[str, Any]:
        earlier = options.get(OVERRIDE)
        if getattr(earlier, "meter", None) is self:
            return options
        return {**options, OVERRIDE: self.attention(earlier)}


def kind_of(module: torch.nn.Module) -> str | None:
    """The class of operator that a module is; None for one that only holds others."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if all(type(n) is int for n in sizes) and next(module.children(), None) is None:
        return "linear"
    if isinstance(module, CONVOLUTIONS):
        return "convolution"
    return "norm" if "norm" in type(module).__name__.lower() else None


def tensors_of(*values: Any) -> list[torch.Tensor]:
    return [v for v in values if isinstance(v, torch.Tensor)]


def work(kind: str, module: Any, args, kwargs, out, weights: int | None) -> tuple[float, float]:
    """(FLOPs, bytes) of one call of a module of that kind: a product of [N, K] with [K, M] is 2 N K M."""
    if kind not in ("linear", "convolution", "norm") or not isinstance(out, torch.Tensor):
        return 0.0, 0.0
    given = tensors_of(*args, *kwargs.values())[:1]
    held = own_bytes(module) if weights is None else weights
    moved = float(held + out.nbytes + sum(t.nbytes for t in given))
    if kind == "norm":
        return 0.0, moved
    if kind == "convolution":
        inputs = module.in_channels // module.groups
        return 2.0 * out.numel() * inputs * _product(module.kernel_size), moved
    return 2.0 * out.numel() * module.in_features, moved


def _product(sizes) -> int:
    made = 1
    for size in sizes:
        made *= size
    return made


def own_bytes(module: torch.nn.Module) -> int:
    """Of a module's own weights, packed ones as they are packed."""
    found = 0
    for weight in module._parameters.values():
        if getattr(weight, "_layout_cls", None) is not None:
            found += sum(t.nbytes for t in weight.state_dict("weight").values())
        elif weight is not None:
            found += weight.nbytes
    return found
