"""What SANA-Video keeps of finished chunks of a clip (arXiv 2509.24695, section 3.3): in every block of the network the sums
of its linear attention's keys and values, and the last frame that entered its convolution over time. Its size knows
nothing of the clip's length; with a window it is a ring of the sums of that many chunks."""

from typing import Any

import torch

from ..kernels.conv.temporal_conv import next_cache
from ..kernels.linear.block_causal import block_causal
from ..kernels.linear.linear_attention import linear_attention
from ..networks.sana_layers import CHUNK, EPS, Sizes
from .block_memory import CURRENT, Block, BlockMemory, Slot

STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KERNEL = 3  # frames under the convolution over time
Key = tuple[Slot, int]  # whose rows, block of the network
ROLES = {0: "positive", 1: "negative"}


class LinearMemory(BlockMemory):
    """window: chunks that are looked back on, 0 for all. positions: the MODEL's own rope_options."""

    def __init__(self, node: str, layers: int, window: int, dtype: str, positions: dict[str, Any]):
        self.node, self.layers, self.window, self.dtype = node, layers, window, STATE_DTYPES[dtype]
        self.positions = positions
        self.sizes: Sizes | None = None  # the model's, where they are known
        self.frames = self.most = 0  # finished frames that it stands for; bytes held at most
        self.sums: dict[Key, torch.Tensor] = {}  # [R, B, H, W], R = 1 or the ring: chunk c at c % R
        self.last: dict[Key, torch.Tensor] = {}  # frame [B, S, C]
        self.made: dict[Key, dict[str, torch.Tensor]] = {}  # by the commit pass: sums [B, H, W], frame
        self.totals: dict[tuple[Key, ...], torch.Tensor] = {}  # of rings, for the chunk that is sampled [B, H, W]
        self.block: Block | None = None
        self.commits_now = False

    def open(self, options: dict[str, Any], block: Block) -> None:
        if self.block is not block:
            self.totals = {}
        self.block, self.made, self.commits_now = block, {}, block.commit
        shift = self.positions.get("shift_t", 0.0) + block.first * self.positions.get("scale_t", 1.0)
        options["rope_options"] = {**self.positions, "shift_t": shift}
        options[CHUNK] = self

    def _keys(self, options: dict[str, Any]) -> list[Key]:
        block = options[CURRENT]
        return [(slot, options["block_index"]) for slot in block.rows(options)]

    def _past(self, keys: list[Key], of: dict[Key, torch.Tensor]) -> list[torch.Tensor] | None:
        """What is held for these rows; None in the first chunk. ValueError where a prompt has none."""
        assert self.block is not None
        if not self.block.number:
            return None
        for (role, number), _ in (key for key in keys if key not in of):
            raise ValueError(
                f"{self.node}: nothing is kept of the finished frames for {ROLES.get(role, f'prompt {role}')} {number + 1}. Give "
                "every chunk the same number of prompts and the cfg of the run that was begun."
            )
        return [of[key] for key in keys]

    def attend(self, options: dict[str, Any], q, k, v, q_rot, k_rot) -> torch.Tensor:
        """[B, H, N, D] -> [B, H, N, D], over the finished chunks and all of this one."""
        keys = self._keys(options)
        past = self._total(keys)
        out, _, states = block_causal(q, k, v, [0, q.shape[2]], past, q_rot, k_rot, "relu", "sum", EPS)
        if self.commits_now:
            if self.window and past is not None:  # the ring takes this chunk's own sums
                states = linear_attention(q, k, v, q_rot, k_rot, "relu", "sum", EPS)[2]
            for key, rows in zip(keys, states[:, :, -1].chunk(len(keys)), strict=True):
                self.made.setdefault(key, {})["sums"] = rows.to(self.dtype, copy=True)
        return out

    def _total(self, keys: list[Key]) -> torch.Tensor | None:
        """Sums over the finished chunks, fp32 [B, H, W]. A ring is added up once a chunk, from its first place on: so a
        continued clip has the same bits."""
        held = self._past(keys, self.sums)
        if held is None:
            return None
        if not self.window:
            return torch.cat([one[0] for one in held]).float()
        if tuple(keys) not in self.totals:
            total = torch.zeros_like(held[0][0], dtype=torch.float32).repeat(len(held), 1, 1)
            for at in range(len(held[0])):
                total += torch.cat([ring[at] for ring in held])
            self.totals[tuple(keys)] = total
        return self.totals[tuple(keys)]

    def frame_before(self, options: dict[str, Any], x: torch.Tensor, frames: int) -> torch.Tensor | None:
        """x [B, T S, C] -> [B, S, C]."""
        keys = self._keys(options)
        held = self._past(keys, self.last)
        if self.commits_now:
            last = next_cache(x, frames, KERNEL)
            for key, rows in zip(keys, last.chunk(len(keys)), strict=True):
                self.made.setdefault(key, {})["frame"] = rows.clone()
        return None if held is None else torch.cat(held).to(x)

    def finished(self, block: Block) -> None:
        """ValueError where the commit pass did not reach every block of the network."""
        made, self.made, committed, self.commits_now = self.made, {}, self.commits_now, False
        self.most, self.totals = max(self.most, self.held_bytes()), {}
        if not committed:
            return
        slots = {slot for slot, _ in made}
        whole = [key for key, value in made.items() if len(value) == 2]
        if not whole or len(whole) < self.layers * len(slots):
            raise ValueError(
                f"{self.node}: {len(whole)} of {self.layers * max(len(slots), 1)} blocks of the network were computed over finished "
                "frames, because another node answered for the others. Take that node off."
            )
        ring = min(self.window, len(block.boundaries) - 1) if self.window else 1
        for key, new in made.items():
            sums = new["sums"]
            if key not in self.sums or len(self.sums[key]) < ring:
                self.sums[key] = self._ring(self.sums.get(key), ring, block.number, sums)
            self.sums[key][block.number % ring] = sums
            self.last[key] = new["frame"]
        self.frames, self.most = block.last, max(self.most, self.held_bytes())

    def _ring(self, old: torch.Tensor | None, size: int, count: int, like: torch.Tensor) -> torch.Tensor:
        """Room for `size` chunks, with the newest of `count` finished ones from a smaller ring in their places."""
        made = like.new_zeros(size, *like.shape)
        for chunk in range(max(0, count - len(old)), count) if old is not None else ():
            made[chunk % size] = old[chunk % len(old)]
        return made

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        kinds = {"sums": self.sums, "frame": self.last}
        tensors = {
            f"{kind}.{role}.{number}.{layer}": value.cpu().clone()
            for kind, held in kinds.items()
            for ((role, number), layer), value in held.items()
        }
        return tensors, self._facts()

    def _facts(self) -> dict[str, Any]:
        return {"num_cached_blocks": self.window, "state_dtype": str(self.dtype)[6:], "layers": self.layers}

    def restore(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any], device: torch.device) -> None:
        for name, own in self._facts().items():
            if facts.get(name) != own:
                raise ValueError(
                    f"{self.node} got a video state with {name} {facts.get(name)}, and here it is {own}. Set it as it was when the "
                    "clip was begun."
                )
        try:
            self._take(tensors, device)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{self.node}: the video state's sums are not whole. Save it again.") from error
        sums, frame = next(iter(self.sums.values())), next(iter(self.last.values()))
        found, sizes = (sums.shape[2], frame.shape[2]), self.sizes
        if sizes is not None and found != (sizes.heads, sizes.width):
            raise ValueError(
                f"{self.node} got a video state of a model with {found[0]} heads and a width of {found[1]}, and this one has "
                f"{sizes.heads} and {sizes.width}. Load the model that it was made with."
            )

    def _take(self, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
        """ValueError or KeyError where the state is not what `state` made."""
        kinds: dict[str, dict[Key, torch.Tensor]] = {"sums": self.sums, "frame": self.last}
        for name, value in tensors.items():
            kind, role, number, layer = name.split(".")
            kinds[kind][(int(role), int(number)), int(layer)] = value.to(device, copy=True)
        slots = {slot for slot, _ in self.sums}
        keys = {(slot, layer) for slot in slots for layer in range(self.layers)}
        sums, frames = ({(value.dtype, tuple(value.shape)) for value in kinds[kind].values()} for kind in kinds)
        if not keys or keys != self.sums.keys() or keys != self.last.keys() or len(sums) != 1 or len(frames) != 1:
            raise ValueError(f"{len(self.sums)} {len(self.last)} {sums} {frames}")
        ((dtype, (ring, batch, heads, held)), (kind, (rows, _, width))) = *sums, *frames
        head = width // max(heads, 1)
        whole = dtype == self.dtype and kind.is_floating_point and rows == batch and held == head * (head + 1)
        if not whole or not 0 < ring <= max(self.window, 1):
            raise ValueError(f"{sums} {frames}")

    def held_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for held in (self.sums, self.last, self.totals) for t in held.values())
