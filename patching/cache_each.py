"""Caches that store something of every block, and let every block answer for itself: what it adds to its stream
(block_residual), or what its attention and MLP give before their gates (module). What a ControlNet adds between blocks is
then the true one at every evaluation, and at level module so are modulation and gates."""

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import comfy.model_management
import torch

from .. import archs
from .blocks import BlockPosition, Streams, block_path, positions
from .cache_blocks import Call, StackCache, _copied, _leaves, _owners
from .cache_state import CacheState
from .forward import Forward
from .forwards import StandIn, exchange, standing
from .memory import stream_elements
from .run import Run, current_forward

MOST = 0.5  # of all the memory of a device
GIB = 2**30


class EachCache(StackCache):
    """What both levels share. The whole stack is skipped or none of it: first_blocks and last_blocks stay 0."""

    level = ""

    def sizes(self, spec: archs.Blocks) -> int:
        """What is stored of one block, in outputs of the block."""
        return 1

    def held_bytes(self, run: Run, noise_shape: tuple[int, ...], conds: dict[str, Any]) -> int:
        """ValueError where that is more than half of the device's memory: unlike one output, every block's can be."""
        blocks = positions(run.arch, run.network) if run.arch is not None else []
        one = self.needed(run, stream_elements(run, noise_shape, conds) if blocks else 0)
        needed = one * sum(self.sizes(block.spec) for block in blocks)
        here = comfy.model_management.get_torch_device() if self.cache_device == "gpu" else torch.device("cpu")
        whole = comfy.model_management.get_total_memory(here)
        if needed > MOST * whole:
            raise ValueError(
                f"{self.name} would hold {needed / GIB:.1f} GiB at level {self.level} for this size, and {here} has "
                f"{whole / GIB:.1f} GiB. Set level to last_block ({max(one / GIB, 0.1):.1f} GiB)"
                f"{', cache_device to cpu' if self.cache_device == 'gpu' and here.type != 'cpu' else ''}, a lower order or "
                "a smaller size."
            )
        return needed if self.cache_device == "gpu" else 0

    def _serve(self, state: CacheState, call: Call, forward, block: BlockPosition, streams: Streams, proceed):
        if block.number == 0:
            self._decide(state, call, forward, block, streams)
        if call.skips:
            state.blocks_skipped += 1
            return self._answer(state, forward, block, streams, proceed)
        state.blocks_computed += 1
        if self.off:
            return proceed(streams)
        out = self._keep(state, forward, block, streams, proceed)
        if block.last:
            state.measure()
        return out

    def _answer(self, state: CacheState, forward, block: BlockPosition, streams: Streams, proceed) -> Streams:
        raise NotImplementedError

    def _keep(self, state: CacheState, forward, block: BlockPosition, streams: Streams, proceed) -> Streams:
        raise NotImplementedError


class ResidualCache(EachCache):
    """Level block_residual: what each block adds to its first stream; nothing of the others is read while skipping."""

    level = "block_residual"

    def _keys(self, forward: Forward, streams: Streams) -> list[Any]:
        return [
            (key, block.number, i)
            for block in positions(forward.run.arch, forward.diffusion_model)
            for i, leaf in enumerate(_leaves(streams[0]))
            for key in _owners(forward, leaf, block)[0]
        ]

    def _keep(self, state: CacheState, forward, block: BlockPosition, streams: Streams, proceed) -> Streams:
        base = _copied(streams[0]) if block.spec.mutates else streams[0]
        out = proceed(streams)
        for i, (after, before) in enumerate(zip(_leaves(out[0]), _leaves(base), strict=True)):
            owners, axis = _owners(forward, after, block)
            for key, rows in zip(owners, (after - before).chunk(len(owners), axis), strict=True):
                state.store(forward.run, (key, block.number, i), rows, measured=False)
        return out

    def _answer(self, state: CacheState, forward, block: BlockPosition, streams: Streams, proceed) -> Streams:
        leaves = []
        for i, leaf in enumerate(_leaves(streams[0])):
            owners, axis = _owners(forward, leaf, block)
            leaves.append(
                leaf + torch.cat([state.predict(forward.run, (key, block.number, i)) for key in owners], axis)
            )
        first = leaves[0] if torch.is_tensor(streams[0]) else type(streams[0])(leaves)
        return (first, *streams[1:])


class ModuleCache(EachCache):
    """Level module: the outputs of attention and MLP, before their gates (TaylorSeer's own place)."""

    level = "module"

    def sizes(self, spec: archs.Blocks) -> int:
        return spec.modules.sizes if spec.modules is not None else 0

    def check_arch(self, arch, class_name: str) -> None:
        super().check_arch(arch, class_name)
        if arch is not None and any(spec.stack and spec.modules is None for spec in arch.blocks):
            self.cannot(
                f"{self.name} does not know the modules inside the blocks of {arch.name}. "
                "Use level=last_block or block_residual."
            )

    def check_model(self, arch, diffusion_model: Any) -> None:
        super().check_model(arch, diffusion_model)
        for spec in arch.blocks if arch is not None else ():
            for _, block in (
                archs.block_modules(diffusion_model, spec) if spec.stack and spec.modules is not None else ()
            ):
                if type(block).__name__ != spec.modules.owner:
                    self.cannot(
                        f"{self.name} does not know the modules inside {type(block).__name__}, the block of this "
                        f"{arch.name} model. Use level=last_block or block_residual."
                    )

    def attached(self, model: Any) -> None:
        """Object patches, which ComfyUI restores on unload: on each block, and on each module whose output is kept."""
        diffusion_model = model.get_model_object("diffusion_model")
        for block in positions(archs.find(diffusion_model), diffusion_model):
            path, modules = block_path(diffusion_model, block.spec, block.index), block.spec.modules
            if isinstance(standing(model, f"{path}.forward"), GatedForward):
                continue

            def gated(forward: Any, written: Any, path=path, modules=modules) -> GatedForward:
                if not isinstance(written, MethodType):
                    raise ValueError(
                        f"{self.name} at level module found that another node has exchanged the forward of {path}. "
                        "Remove that node, or use level=last_block."
                    )
                return GatedForward(forward, modules, written)

            exchange(model, path, gated)
            for name in modules.paths:
                exchange(model, f"{path}.{name}", lambda forward, _, name=name: ToldForward(forward, name))

    def _keys(self, forward: Forward, streams: Streams) -> list[Any]:
        """The first output of every module: the others come and go with it."""
        return [
            (key, block.number, name, 0)
            for block in positions(forward.run.arch, forward.diffusion_model)
            for name in block.spec.modules.paths
            for key in _owners(forward, _leaves(streams[0])[0], block)[0]
        ]

    def _keep(self, state: CacheState, forward, block: BlockPosition, streams: Streams, proceed) -> Streams:
        def told(name: str, output: Any) -> None:
            for i, leaf in enumerate(_leaves(output)):
                owners, axis = _owners(forward, leaf, block)
                for key, rows in zip(owners, leaf.chunk(len(owners), axis), strict=True):
                    state.store(forward.run, (key, block.number, name, i), rows, measured=False)

        return _within(forward, "told", told, proceed, streams)

    def _answer(self, state: CacheState, forward, block: BlockPosition, streams: Streams, proceed) -> Streams:
        keys = _owners(forward, _leaves(streams[0])[0], block)[0]
        series = forward.run.clock.series

        def output(name: str) -> Any:
            leaves = []
            while ((keys[0], block.number, name, len(leaves)), series) in state.histories:
                rows = [state.predict(forward.run, (key, block.number, name, len(leaves))) for key in keys]
                leaves.append(rows[0] if len(rows) == 1 else torch.cat(rows))
            return leaves[0] if len(leaves) == 1 else tuple(leaves)

        return _within(forward, "outputs", output, proceed, streams)


def _within(forward: Forward, field: str, value: Callable[..., Any], proceed, streams: Streams) -> Streams:
    setattr(forward, field, value)
    try:
        return proceed(streams)
    finally:
        setattr(forward, field, None)


class GatedForward(StandIn):
    """Stands in for a block's forward: from outputs that are already known where a run has them. Else inert."""

    def __init__(self, original: Any, modules: archs.Modules, written: MethodType):
        self.original, self.modules, self.block = original, modules, written.__self__
        self.signature = inspect.signature(written)

    def __call__(self, *args, **kwargs):
        forward = current_forward.get()
        if forward is None or forward.outputs is None:
            return self.original(*args, **kwargs)
        given = self.signature.bind(*args, **kwargs)
        given.apply_defaults()
        outputs = {name: forward.outputs(name) for name in self.modules.paths}
        return self.modules.gated(self.block, given.arguments, outputs)


class ToldForward(StandIn):
    """Stands in for the forward of a module in a block: tells a run that asks for it the output. Else inert."""

    def __init__(self, original, name: str):
        self.original, self.name = original, name

    def __call__(self, *args, **kwargs):
        output = self.original(*args, **kwargs)
        forward = current_forward.get()
        if forward is not None and forward.told is not None:
            forward.told(self.name, output)
        return output
