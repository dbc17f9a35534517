"""A cache in place of the block stack: the first blocks may always run, then a gate is asked, and up to the last blocks
either all are computed and the result stored, or all pass their input on and the result is filled in."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from .blocks import BlockFeature, BlockPosition, Streams, positions
from .cache import CacheFeature
from .cache_state import CacheState
from .forward import Forward
from .memory import stream_elements
from .run import Run


@dataclass
class Call:
    """One call of the model, while it lasts."""

    before: Streams = ()  # the first condition's rows of each stream before the first block, where a gate wants them
    first: Any = None  # the block list that these belong to
    base: Streams = ()  # every stream where the skipped part begins, where residuals are stored
    spec: Any = None  # the block list that base belongs to
    skips: bool = False
    decides: bool = False  # the gate waits for what this call computes


class StackCache(BlockFeature, CacheFeature):
    """Level last_block: what is stored is the output of the last skipped block."""

    def check_arch(self, arch, class_name: str) -> None:
        if arch is None:
            self.cannot(
                f"{self.name} does not know the blocks of {class_name}. Use level=output, which works on every model."
            )
        elif "blocks" in arch.limits:
            self.cannot(f"{self.name}: {arch.limits['blocks']} Use level=output.")

    def check_model(self, arch, diffusion_model: Any) -> None:
        count = len(positions(arch, diffusion_model)) if arch is not None and "blocks" not in arch.limits else None
        if count is not None and self.first_blocks + self.last_blocks >= count:
            raise ValueError(
                f"{self.name} always computes the first {self.first_blocks} and the last {self.last_blocks} blocks, which "
                f"leaves none of this model's {count} to skip. Lower first_blocks{' or last_blocks' if self.last_blocks else ''}."
            )

    def held_bytes(self, run: Run, noise_shape: tuple[int, ...], conds: dict[str, Any]) -> int:
        elements = stream_elements(run, noise_shape, conds) if run.arch is not None else 0
        return self.held(run, elements)

    def around_block(self, state: CacheState, forward: Forward, block: BlockPosition, streams: Streams, proceed):
        call = state.calls.setdefault(id(forward), Call())
        try:
            return self._serve(state, call, forward, block, streams, proceed)
        finally:
            if block.last:
                del state.calls[id(forward)]

    def _serve(self, state: CacheState, call: Call, forward, block: BlockPosition, streams: Streams, proceed):
        first = self.first_blocks
        end = block.count - 1 - self.last_blocks
        if block.number == 0 and first:
            call.before = tuple(
                _first_rows(forward, block, s, n).clone() for n, s in enumerate(streams) if s is not None
            )
            call.first = block.spec
        if block.number == first:
            self._decide(state, call, forward, block, streams)
        if not first <= block.number <= end or not call.skips:
            out = proceed(streams)
            state.blocks_computed += 1
            if block.number == end and not call.skips and not self.off:
                self._store(state, call, forward, block, out)
            return out
        state.blocks_skipped += 1
        return self._fill(state, call, forward, block, streams) if block.number == end else streams

    def _decide(self, state: CacheState, call: Call, forward: Forward, block: BlockPosition, streams: Streams) -> None:
        """Only where every stream of this call has a history of the same text length: core pads prompts to a common
        length in joined CFG, so the same condition may come with more or fewer text tokens."""

        def look(seen):
            call.decides = True
            now = _first_rows(forward, block, streams[0])
            before = _laid_out(call.before, call.first, block, forward.run.arch.place)[0] if call.before else now
            axis = block.spec.axes.find("B")
            every = _leaves(streams[0])[0] if axis >= 0 else None
            return replace(seen, before=before, now=now, modulated=forward.modulated, every=every, axis=axis)

        full = state.computes(forward, look) | self.held_back(state, forward)
        shape = _shape(streams, block)
        keys = self._keys(forward, streams)
        fits = state.fits(forward.run, keys, shape)
        call.skips = fits and not full and state.ready(forward.run, keys)
        state.mark(call.skips)
        if self.residual and not self.off:
            written = forward.control is not None or (block.spec.mutates and not call.skips)
            call.base = tuple(_copied(s) if written else s for s in streams)
            call.spec = block.spec

    def _stored(self, streams: Streams) -> list[int]:
        """Numbers of the streams that are stored: only the first where nothing reads the others afterwards."""
        return [i for i, s in enumerate(streams) if s is not None] if self.last_blocks else [0]

    def _keys(self, forward: Forward, streams: Streams) -> list[Any]:
        """Of every history that a fill of this call would need, as the last filled block stores them."""
        at = positions(forward.run.arch, forward.diffusion_model)
        block = at[len(at) - 1 - self.last_blocks]
        count = min(len(block.spec.streams), len(streams)) if self.last_blocks else 1
        return [
            (key, s, i)
            for s in range(count)
            if streams[s] is not None
            for i, leaf in enumerate(_leaves(streams[s]))
            for key in _owners(forward, leaf, block, s)[0]
        ]

    def _store(self, state: CacheState, call: Call, forward: Forward, block: BlockPosition, out: Streams) -> None:
        if call.decides:
            state.tell(forward, _first_rows(forward, block, out[0]))
        base = _joined(call, block, out, forward.run.arch.place, self.name) if self.residual else ()
        for s in self._stored(out):
            for i, leaf in enumerate(_leaves(out[s])):
                value = leaf - _leaves(base[s])[i] if self.residual else leaf
                owners, axis = _owners(forward, leaf, block, s)
                for key, rows in zip(owners, value.chunk(len(owners), axis), strict=True):
                    state.store(forward.run, (key, s, i), rows)

    def _fill(self, state: CacheState, call: Call, forward: Forward, block: BlockPosition, streams: Streams) -> Streams:
        base = _joined(call, block, streams, forward.run.arch.place, self.name) if self.residual else streams
        filled = list(streams)
        for s in self._stored(streams):
            leaves = []
            for i, leaf in enumerate(_leaves(streams[s])):
                owners, axis = _owners(forward, leaf, block, s)
                rows = [state.predict(forward.run, (key, s, i)) for key in owners]
                value = rows[0] if len(rows) == 1 else torch.cat(rows, axis)
                leaves.append(_leaves(base[s])[i] + value if self.residual else value)
            filled[s] = leaves[0] if torch.is_tensor(streams[s]) else type(streams[s])(leaves)
        return tuple(filled)


def _joined(call: Call, block: BlockPosition, like: Streams, place: str, name: str) -> Streams:
    """The streams where skipping began, as this block has them."""
    base = _laid_out(call.base, call.spec, block, place)
    shapes = ([x.shape for x in _leaves(s)] for s in (base[0], like[0]))
    if len({str(s) for s in shapes}) > 1:
        raise ValueError(
            f"{name} cannot store residuals on this model: its token sequence changes from {tuple(base[0].shape)} to "
            f"{tuple(_leaves(like[0])[0].shape)} between blocks. Set fill to taylor1."
        )
    return base


def _laid_out(streams: Streams, spec: Any, block: BlockPosition, place: str) -> Streams:
    """Streams of a block of that list as this block has them: text and image may be one sequence by now."""
    if spec is block.spec or not block.spec.joined or len(streams) != 2:
        return streams
    return (torch.cat((streams[1], streams[0]) if place == "prefix" else (streams[0], streams[1]), 1),)


def _leaves(stream) -> list[torch.Tensor]:
    return [stream] if torch.is_tensor(stream) else list(stream)


def _copied(stream):
    if stream is None:
        return None
    return stream.clone() if torch.is_tensor(stream) else type(stream)(x.clone() for x in stream)


def _shape(streams: Streams, block: BlockPosition):
    """Sizes of every stream but the batch's: joined and separate calls of one prompt look alike."""
    axes = [max(block.spec.axes.find("B"), 0)] + [0] * (len(streams) - 1)
    return tuple(
        (*leaf.shape[:axis], *leaf.shape[axis + 1 :])
        for axis, stream in zip(axes, streams, strict=True)
        if stream is not None
        for leaf in _leaves(stream)
    )


def _owners(forward: Forward, leaf: torch.Tensor, block: BlockPosition, stream: int = 0) -> tuple[list[Any], int]:
    """The stream of each equal chunk of the block's batch axis, and that axis; all streams as one, in their order,
    where the block has no axis of its own for the batch."""
    axis = block.spec.axes.find("B") if stream == 0 else 0
    if axis < 0 or leaf.shape[axis] % len(forward.keys):
        return [forward.keys], 0
    return list(forward.keys), axis


def _first_rows(forward: Forward, block: BlockPosition, stream, number: int = 0) -> torch.Tensor:
    """The first condition's rows of a block's stream of that number; all of them where it has no batch axis."""
    leaf = _leaves(stream)[0]
    owners, axis = _owners(forward, leaf, block, number)
    return leaf.chunk(len(owners), axis)[0]
