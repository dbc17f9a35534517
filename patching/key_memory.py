"""The memory of softmax models: keys and values of finished frames, as they were with their places in the clip, before those
of the block in work. Positions go on through rope_options, so a stock model attends as its block-causal kin does."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..methods.control.held_keys import Held, hold
from ..methods.video import blocks as plan
from .block_memory import CURRENT, Block, BlockMemory, Slot

Place = tuple[int, int]  # number of the transformer block, attention call in it
Pair = tuple[Held, Held]
ROPE = "rope_options"
STORED = {"model dtype": "auto", "fp8_e4m3": "fp8_e4m3", "int8": "int8"}


@dataclass
class Chunk:
    """One finished block. pairs: keys and values [B, H, tokens, D] by whose they are and where."""

    frames: int
    pairs: dict[tuple[Slot, Place], Pair] = field(default_factory=dict)


class KeyMemory(BlockMemory):
    """window: blocks, 0 all; sink: first frames that stay whatever the window; device: "cpu" or None, where they are made."""

    def __init__(
        self, name: str, window: int = 0, sink: int = 0, stored: str = "model dtype", device: str | None = None
    ):
        self.name, self.window, self.sink, self.stored, self.device = name, window, sink, stored, device
        self.chunks: dict[int, Chunk] = {}  # by number of the block
        self.rope: dict[str, Any] | None = None
        self.scales = (1.0, 1.0, 1.0)  # the model's own of positions t, y, x, which rope_options take the place of
        self.sizes: tuple[int, int, int] | None = (
            None  # transformer blocks, heads and their width, where they are known
        )
        self.most = 0  # bytes held, at most
        self.frames = 0  # finished ones that the newest block looks back on

    def open(self, options: dict[str, Any], block: Block) -> None:
        self.frames = sum(chunk.frames for number, chunk in self.chunks.items() if number != block.number)
        if self.rope is None:
            own = {f"scale_{axis}": scale for axis, scale in zip("tyx", self.scales, strict=True)}
            theirs = options.get(ROPE)  # core's ScaleROPE node
            self.rope = {"shift_t": 0.0, "scale_t": 1.0, **(own if theirs is None else theirs)}
        shift = self.rope["shift_t"] + block.first * self.rope["scale_t"]
        options[ROPE] = {"shift_x": 0.0, "shift_y": 0.0, "scale_x": 1.0, "scale_y": 1.0, **self.rope, "shift_t": shift}

    def with_past(self, forward: Any, place: Place, k: torch.Tensor, v: torch.Tensor) -> tuple[Any, Any]:
        """k, v [B, H, N, D] of a block's self-attention -> with the finished frames before them. In a commit pass they are
        kept."""
        block: Block = forward.options[CURRENT]
        rows = block.rows(forward.options)
        parts = list(zip(k.chunk(len(rows)), v.chunk(len(rows)), strict=True))
        if block.commit:
            self._store(forward, block, place, dict(zip(rows, parts, strict=True)))
        past = [chunk for number, chunk in sorted(self.chunks.items()) if number != block.number]
        if not past:
            return k, v
        forward.before = sum(chunk.frames for chunk in past)
        joined = []
        for slot, part in zip(rows, parts, strict=True):
            held = [self._found(chunk, slot, place) for chunk in past]
            joined.append(
                [torch.cat([*(pair[i].to(k.device).tensor().to(k) for pair in held), part[i]], 2) for i in range(2)]
            )  # a state may be of another precision
        return torch.cat([part[0] for part in joined]), torch.cat([part[1] for part in joined])

    def _store(self, forward, block: Block, place: Place, rows: dict[Slot, tuple[torch.Tensor, torch.Tensor]]) -> None:
        frames, tokens = block.last - block.first, next(iter(rows.values()))[0].shape[2]
        grid = forward.grid
        if grid is None or tokens != frames * grid[1] * grid[2]:
            raise ValueError(
                f"{self.name} keeps the keys of {frames} frames of {grid and grid[1:]} tokens, and got {tokens} tokens: this model "
                "puts others into the sequence, or a node on it leaves some out. Use memory frames, or take that node off."
            )
        chunk = self.chunks.setdefault(block.number, Chunk(frames))
        for slot, (k, v) in rows.items():
            if (slot, place) not in chunk.pairs:  # guidance that asks a prompt twice asks the plain way first
                chunk.pairs[slot, place] = self._held(k), self._held(v)

    def _held(self, x: torch.Tensor) -> Held:
        held = hold(x.clone(memory_format=torch.contiguous_format), STORED[self.stored])
        return held if self.device is None else held.to(self.device)

    def _found(self, chunk: Chunk, slot: Slot, place: Place) -> Pair:
        """A prompt that stood down before the end of the schedule has none of its own, but another one in its role does."""
        found = chunk.pairs.get((slot, place))
        if found is None:
            others = sorted(s for s, at in chunk.pairs if at == place and s[0] == slot[0])
            if not others:
                raise ValueError(
                    f"{self.name}: no {'negative' if slot[0] else 'positive'} prompt was asked for in the pass over the finished "
                    "block. Let guidance act on the whole schedule, and go on with a state at the cfg that it was made with."
                )
            found = chunk.pairs[others[0], place]
        return found

    def finished(self, block: Block) -> None:
        """Drops what the next block does not look back on."""
        self.most = max(self.most, self.held_bytes())
        kept = set(plan.kept(block.boundaries, block.last, self.window, self.sink))
        for number, (first, last) in enumerate(plan.pairs(block.boundaries)):
            if number not in self.chunks:
                continue
            frames = sum(frame in kept for frame in range(first, last))
            if not frames:
                del self.chunks[number]
            elif frames < self.chunks[number].frames:
                self.chunks[number] = self._first(self.chunks[number], frames)

    def _first(self, chunk: Chunk, frames: int) -> Chunk:
        counts = {key: k.data.shape[2] // chunk.frames * frames for key, (k, _) in chunk.pairs.items()}
        return Chunk(
            frames, {key: (k.tokens(counts[key]), v.tokens(counts[key])) for key, (k, v) in chunk.pairs.items()}
        )

    @property
    def tokens(self) -> int:
        """Of a frame, at most: prompts of an area have fewer."""
        every = [(c, k) for c in self.chunks.values() for k, _ in c.pairs.values()]
        return max((k.data.shape[2] // chunk.frames for chunk, k in every), default=0)

    def held_bytes(self) -> int:
        held = [part for chunk in self.chunks.values() for pair in chunk.pairs.values() for part in pair]
        return sum(part.bytes for part in held)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors = {}
        for number, chunk in self.chunks.items():
            for (slot, place), pair in chunk.pairs.items():
                for what, held in zip("kv", pair, strict=True):
                    name = ".".join(map(str, (number, *slot, *place, what)))
                    tensors[name] = held.data.cpu().clone()
                    if held.scale is not None:
                        tensors[f"{name}.scale"] = held.scale.cpu().clone()
        dtype = next((str(pair[0].dtype) for chunk in self.chunks.values() for pair in chunk.pairs.values()), "")
        frames = {str(number): chunk.frames for number, chunk in self.chunks.items()}
        settings = {"window": self.window, "sink": self.sink, "stored": self.stored}
        return tensors, {**settings, "frames": frames, "tokens": self.tokens, "dtype": dtype.removeprefix("torch.")}

    def restore(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any], device: torch.device) -> None:
        for name in ("window", "sink", "stored"):
            if name in facts and facts[name] != getattr(self, name):
                raise ValueError(
                    f"{self.name}: the video state was kept with {name} {facts.get(name)!r}, and this one has "
                    f"{getattr(self, name)!r}. Set it to {facts.get(name)!r}."
                )
        try:
            self._take(tensors, facts, self.device or device)
        except (KeyError, ValueError, AttributeError, TypeError, IndexError) as error:
            raise ValueError(f"{self.name}: the video state's keys are not whole. Save it again.") from error
        places = {(place[0], pair[0].data.shape) for c in self.chunks.values() for (_, place), pair in c.pairs.items()}
        _, heads, _, width = next(iter(places))[1]
        found = len({block for block, _ in places}), heads, width
        if self.sizes is not None and found != self.sizes:
            raise ValueError(
                f"{self.name}: the video state holds keys of {found[0]} transformer blocks with {heads} heads {width} wide, and this "
                f"model has {self.sizes[0]} with {self.sizes[1]} {self.sizes[2]} wide. Load the model that it was made with."
            )

    def _take(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any], device: torch.device | str) -> None:
        """Any of these errors where the state is not what `state` made."""
        dtype = getattr(torch, facts["dtype"])
        if not {"window", "sink", "stored"} <= facts.keys():
            raise KeyError("a setting")
        self.chunks = {int(number): Chunk(int(frames)) for number, frames in facts["frames"].items()}
        left = set(tensors)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(facts["dtype"])
        for name in sorted(tensors):
            number, *key = name.split(".")
            if key[4:] != ["k"]:
                continue
            role, nth, block, call = map(int, key[:4])
            chunk, pair = self.chunks[int(number)], []
            for what in "kv":
                at = name[:-1] + what
                held = Held(tensors[at], tensors.get(f"{at}.scale"), dtype)
                if not held.made_by(STORED[self.stored]) or held.data.shape[2] % chunk.frames:
                    raise ValueError(f"{at} {[*held.data.shape]}")
                left -= {at, f"{at}.scale"}
                pair.append(held.to(device))
            chunk.pairs[(role, nth), (block, call)] = pair[0], pair[1]
        if self.tokens != int(facts["tokens"]):
            raise ValueError(facts["tokens"])
        self._check(left)

    def _check(self, left: set[str]) -> None:
        """ValueError where a prompt of a chunk lacks what another has or is of several lengths, or names are left."""
        parts, shapes, uneven = [], set(), False
        for chunk in self.chunks.values():
            parts += [{p for s, p in chunk.pairs if s == slot} for slot in {s for s, _ in chunk.pairs}] or [set()]
            shapes |= {(*x.data.shape[:2], x.data.shape[3]) for pair in chunk.pairs.values() for x in pair}
            lengths = {(slot, x.data.shape[2]) for (slot, _), pair in chunk.pairs.items() for x in pair}
            uneven = uneven or len(lengths) != len({slot for slot, _ in lengths})
        if left or uneven or len(shapes) != 1 or any(part != parts[0] for part in parts):
            raise ValueError(f"{sorted(left)[:1]} {sorted(shapes)}")
