"""Runs a tiny model with its blocks hooked the way its Arch says, and records what its attention and blocks do."""

import functools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BOOTSTRAP = str(Path(__file__).resolve().parents[2] / "bootstrap")
if BOOTSTRAP not in sys.path:
    sys.path.insert(0, BOOTSTRAP)

from pack import load_pack, use_comfyui

use_comfyui()
load_pack()

import comfy.utils
from tiny_models import SPECS, empty_latent, sample, tiny
from tiny_specs import Spec
from tiny_variants import VARIANTS, call
from tiny_variants import module as bare_model

from tessera.archs import Arch, Blocks, block_modules, find

Streams = tuple[Any, ...]


@dataclass
class Call:
    """One optimized_attention call."""

    block: tuple[str, int] | None  # (path of the list, index), None outside the listed blocks
    nth: int  # within the block
    queries: int
    keys: int
    value: torch.Tensor  # a copy, tokens first: [L, ...]
    options: dict[str, Any]


@dataclass
class Record:
    """One run of one step."""

    output: torch.Tensor
    grid: tuple[int, int, int] = (0, 0, 0)
    calls: list[Call] = field(default_factory=list)
    order: list[str] = field(default_factory=list)  # paths of the block modules that were called
    computed: set[str] = field(default_factory=set)  # and of those in which some layer ran
    outputs: dict[str, Any] = field(default_factory=dict)  # what each list's first block module returned
    written: set[str] = field(default_factory=set)  # lists of which a block changed a tensor that it was given
    wrapped: bool = False  # the DIFFUSION_MODEL wrapper fired


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


class Case:
    """A tiny model and the ways to run it: one euler step at CFG 1, everything seeded."""

    current: tuple[str, int] | None = None  # the block being computed

    def __init__(self, name: str):
        self.name, self.spec = name, SPECS[name]
        self.model, _ = tiny(name)
        self.diffusion_model = self.model.model.diffusion_model
        self.arch: Arch = find(self.diffusion_model)
        assert self.arch is not None

    def lists(self, stack: bool | None = None) -> list[Blocks]:
        return [b for b in self.arch.blocks if stack is None or b.stack is stack]

    def modules(self, stack: bool | None = None):
        """(list, index, path, module) of every declared block."""
        return [
            (b, i, path, m)
            for b in self.lists(stack)
            for i, (path, m) in enumerate(block_modules(self.diffusion_model, b))
        ]

    def execute(self, model, spec: Spec) -> torch.Tensor:
        """The image or video that this patched model makes."""
        out = sample(model, spec, steps=1, cfg=1.0, latent=empty_latent(spec))
        return out if isinstance(out, torch.Tensor) else out.unbind()[0]

    def unhooked(self) -> torch.Tensor:
        return self.execute(self.model.clone(), self.spec)

    @functools.cached_property
    def plain(self) -> torch.Tensor:
        return self.unhooked()

    @functools.cached_property
    def record(self) -> Record:
        return self.run()

    def run(self, around=None, stack=None, perturb=None, extra=None, spec: Spec | None = None) -> Record:
        """around(blocks, index, streams, proceed) -> streams answers for each block of the declared lists;
        `perturb`, a flat index into the token grid, changes that patch of the latent; extra(x) makes more arguments
        of the diffusion model."""
        model, record = self.model.clone(), Record(torch.empty(0))
        self._patch_forward(model, record, perturb, extra)
        if around is not None:
            for blocks, index, path, _ in self.modules(stack):
                hook(model, blocks, index, f"diffusion_model.{path}.forward", around)
        handles = self._watch(record)
        try:
            record.output = self.execute(model, spec or self.spec)
        finally:
            for handle in handles:
                handle.remove()
            self.current = None
        return record

    def _patch_forward(self, model, record: Record, perturb, extra) -> None:
        arch, dm = self.arch, self.diffusion_model
        original = model.get_model_object("diffusion_model.forward")  # another clone's patch may still be in place

        def forward(x, *args, **kwargs):
            record.grid = arch.grid(dm, x)
            kwargs.update(extra(x) if extra else {})
            args = args[1:] if "timestep" in kwargs else args
            return original(x if perturb is None else changed(x, record.grid, perturb), *args, **kwargs)

        def wrapper(executor, *args, **kwargs):
            record.wrapped = True
            return executor(*args, **kwargs)

        model.add_object_patch("diffusion_model.forward", forward)
        model.add_wrapper_with_key("diffusion_model", "test", wrapper)
        options = model.model_options["transformer_options"]
        options["optimized_attention_override"] = functools.partial(self._attention, record)

    def _attention(self, record: Record, func, *args, **kwargs):
        axis = 2 if kwargs.get("skip_reshape") or (len(args) > 6 and args[6]) else 1
        block = self.current
        nth = sum(c.block == block for c in record.calls)
        value = args[2].detach().clone().movedim(axis, 0)
        options = dict(kwargs.get("transformer_options") or {})
        record.calls.append(Call(block, nth, args[0].shape[axis], args[1].shape[axis], value, options))
        return func(*args, **kwargs)

    def _watch(self, record: Record) -> list:
        handles = []
        for blocks, index, path, module in self.modules():

            def before(module, args, kwargs, blocks=blocks, index=index, path=path):
                self.current = (blocks.path, index)
                record.order.append(path)
                seen = [*tensors(args), *tensors(list(kwargs.values()))]
                module._test_seen = [(t, t.clone()) for t in seen]

            def after(module, args, kwargs, out, blocks=blocks, index=index):
                self.current = None
                record.outputs.setdefault(blocks.path, out)
                if any(not torch.equal(t, kept) for t, kept in module.__dict__.pop("_test_seen")):
                    record.written.add(blocks.path)

            def layer(*_, path=path):
                record.computed.add(path)

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
            handles += [m.register_forward_pre_hook(layer) for m in module.modules() if m is not module]
        return handles


class Patches:
    """The part of ModelPatcher that a Case uses, for a bare diffusion model."""

    def __init__(self, diffusion_model: torch.nn.Module):
        self.model = SimpleNamespace(diffusion_model=diffusion_model)
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.objects: dict[str, Any] = {}

    def clone(self) -> "Patches":
        return Patches(self.model.diffusion_model)

    def get_model_object(self, path: str) -> Any:
        return comfy.utils.get_attr(self.model, path)

    def add_object_patch(self, path: str, value) -> None:
        self.objects[path] = value

    def set_model_patch_replace(self, patch, name: str, block: str, number: int) -> None:
        replace = self.model_options["transformer_options"].setdefault("patches_replace", {})
        replace.setdefault(name, {})[block, number] = patch

    def add_wrapper_with_key(self, kind: str, key: str, wrapper) -> None:
        wrappers = self.model_options["transformer_options"].setdefault("wrappers", {})
        wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)


class DirectCase(Case):
    """A variant without loader and sampler: one evaluation of the bare model."""

    def __init__(self, name: str):
        self.name, self.spec = name, VARIANTS[name]
        self.diffusion_model = bare_model(self.spec)
        self.model = Patches(self.diffusion_model)
        self.arch: Arch = find(self.diffusion_model)
        assert self.arch is not None

    def execute(self, model: Patches, spec: Spec) -> torch.Tensor:
        owners = [(comfy.utils.get_attr(model.model, path.rpartition(".")[0]), f) for path, f in model.objects.items()]
        for owner, forward in owners:
            owner.forward = forward
        try:
            return call(self.diffusion_model, spec, model.model_options["transformer_options"])
        finally:
            for owner, _ in owners:
                del owner.forward


def changed(x, grid, flat: int):
    """The model's input with one patch of the image or video moved."""
    if not isinstance(x, torch.Tensor):
        return [changed(x[0], grid, flat), *x[1:]]
    x, (_, rows, columns) = x.clone(), grid
    if x.ndim == 3:
        x.select(1 if x.shape[1] == columns else 2, flat).add_(3)
        return x
    t, h, w = flat // (rows * columns), flat // columns % rows, flat % columns
    ph, pw = -(-x.shape[-2] // rows), -(-x.shape[-1] // columns)
    part = x[..., h * ph : (h + 1) * ph, w * pw : (w + 1) * pw]
    (part[:, :, t] if x.ndim == 5 else part).add_(3)
    return x


def hook(model, blocks: Blocks, index: int, path: str, around) -> None:
    """Puts `around` on one block by the mechanism that its Arch declares."""
    if blocks.replace is not None:

        def replacement(args, extra):
            def proceed(streams):
                out = extra["original_block"]({**args, **dict(zip(blocks.streams, streams, strict=True))})
                return tuple(out[name] for name in blocks.streams)

            streams = around(blocks, index, tuple(args[name] for name in blocks.streams), proceed)
            return dict(zip(blocks.streams, streams, strict=True))

        model.set_model_patch_replace(replacement, "dit", blocks.replace, index)
        return

    original = model.get_model_object(path)

    def forward(*args, **kwargs):
        def proceed(streams):
            given, named = list(args), dict(kwargs)
            for name, place, value in zip(blocks.streams, blocks.positions, streams, strict=True):
                if name in named:
                    named[name] = value
                else:
                    given[place] = value
            out = original(*given, **named)
            return (out,) if len(blocks.streams) == 1 else out

        places = zip(blocks.streams, blocks.positions, strict=True)
        streams = tuple(kwargs[name] if name in kwargs else args[place] for name, place in places)
        streams = around(blocks, index, streams, proceed)
        return streams[0] if len(blocks.streams) == 1 else tuple(streams)

    model.add_object_patch(path, forward)


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def inference():
    """As ComfyUI runs every node; for one test at a time, or the tests after this folder would run so too."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def case_named():
    cases = functools.cache(lambda name: Case(name) if name in SPECS else DirectCase(name))
    yield cases
    cases.cache_clear()


@pytest.fixture(params=[*SPECS, *VARIANTS])
def case(request, case_named):
    return case_named(request.param)
