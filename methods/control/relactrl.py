"""RelaCtrl (arXiv 2502.14377, section 3): a few light control blocks where PixArt heeds control most.

After block p_n of the base stands control block n. With x the base's tokens behind that block, c the control's own:

    c <- c_image W_in + x  (n = 0)   or   c + x W_in        W_in, W_out: Linear with bias, zero before training
    c <- c + gate * M(norm(c) (1 + scale) + shift)          shift, scale, gate: the first three of table + t0
    the next base block gets x + c W_out; so do the blocks after it, until the next control block

M permutes the channels, cuts them into groups of d and mixes each group by attention among shuffled scalars. Both
permutations are drawn anew at every call of the official code, in training and after it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from ...kernels.control.shuffle_window import shuffle_window
from ...kernels.norm.norm_modulate import norm_modulate

PLACES = (0, 2, 3, 4, 5, 6, 7, 8, 9, 18, 19)  # base blocks that the released control blocks stand behind
HEADS, SEGMENTS = 4, 4
Pair = tuple[torch.Tensor, torch.Tensor]  # weight [out, in] and bias [out] of a Linear
POLICIES = ("fixed", "per_step", "per_call")


@dataclass(frozen=True, eq=False)
class ControlBlock:
    """One control block of width D. groups: (qkv, proj) of each group of d channels, in order; their d add up to D."""

    before: Pair
    after: Pair
    table: torch.Tensor  # [6, D]
    groups: tuple[tuple[Pair, Pair], ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels d of each group."""
        return tuple(proj[0].shape[0] for _, proj in self.groups)

    @property
    def tensors(self) -> list[torch.Tensor]:
        mixers = [tensor for group in self.groups for pair in group for tensor in pair]
        return [*self.before, *self.after, self.table, *mixers]

    def to(self, device: torch.device, dtype: torch.dtype) -> "ControlBlock":
        """The same weights there; those that are there already are not copied."""

        def moved(pair: Pair) -> Pair:
            return pair[0].to(device, dtype), pair[1].to(device, dtype)

        groups = tuple((moved(qkv), moved(proj)) for qkv, proj in self.groups)
        return ControlBlock(moved(self.before), moved(self.after), self.table.to(device, dtype), groups)


@dataclass(frozen=True, eq=False)
class RelaCtrl:
    """What a file holds. places: the base block behind which each control block stands."""

    name: str
    blocks: tuple[ControlBlock, ...]
    places: tuple[int, ...] = PLACES

    @property
    def width(self) -> int:
        return self.blocks[0].table.shape[1]

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for block in self.blocks for tensor in block.tensors)


@dataclass(frozen=True, eq=False)
class Draw:
    """The permutations of one control block: new channel i is old channel order[i]; of each group its L d scalars."""

    order: torch.Tensor  # int64 [D]
    scalars: tuple[torch.Tensor, ...]  # int32 [L d]


class Draws:
    """The permutations of one evaluation, drawn when they are first needed, as the official code draws them after
    torch.manual_seed(seed): block after block, first the channels, then the scalars of each group. On the CPU on every
    device."""

    def __init__(self, seed: int, widths: Sequence[tuple[int, ...]], tokens: int, device: torch.device):
        self.widths, self.tokens, self.device = widths, tokens, device
        self._generator = torch.Generator().manual_seed(seed % (1 << 64))
        self._drawn: list[Draw] = []

    def __getitem__(self, block: int) -> Draw:
        while len(self._drawn) <= block:
            widths = self.widths[len(self._drawn)]
            order = torch.randperm(sum(widths), generator=self._generator).to(self.device)
            sizes = [self.tokens * width for width in widths]
            drawn = [torch.randperm(size, generator=self._generator).to(torch.int32) for size in sizes]
            self._drawn.append(Draw(order, tuple(scalars.to(self.device) for scalars in drawn)))
        return self._drawn[block]


def draw_bytes(blocks: Sequence[ControlBlock], tokens: int) -> int:
    """What the permutations of one evaluation take."""
    return sum(4 * tokens * width + 8 * width for block in blocks for width in block.widths)


def check_tokens(rows: int, columns: int) -> None:
    """ValueError where a picture of so many tokens cannot be cut into equal segments."""
    if rows * columns % SEGMENTS:
        high, wide = (max(32, side // 2 * 32) for side in (rows, columns))
        raise ValueError(
            f"RelaCtrl cuts the picture's tokens into {SEGMENTS} equal parts, and {columns * 16} x {rows * 16} pixels are "
            f"{columns} x {rows} = {rows * columns} tokens, no multiple of {SEGMENTS}. Take a width and a height that 32 divides, for "
            f"example {wide} x {high}."
        )


def mix(block: ControlBlock, c: torch.Tensor, draw: Draw) -> torch.Tensor:
    """M: modulated tokens [B, L, D] -> [B, L, D]."""
    parts = c.index_select(2, draw.order).split(block.widths, 2)
    mixed = [
        shuffle_window(part, scalars, *qkv, *proj, heads=HEADS, segments=SEGMENTS)
        for part, scalars, (qkv, proj) in zip(parts, draw.scalars, block.groups, strict=True)
    ]
    return torch.cat(mixed, 2).index_select(2, draw.order.argsort())


def control_block(
    block: ControlBlock, first: bool, x: torch.Tensor, c: torch.Tensor, t0: torch.Tensor, draw: Draw
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, c [B, L, D]: tokens of the base and of the control (of the image, for the first block); t0 [B, 6 D]: the base's
    modulation by time -> (the control's tokens, what is added to the base's), both [B, L, D]."""
    c = x + functional.linear(c, *block.before) if first else c + functional.linear(x, *block.before)
    shift, scale, gate = (block.table[:3] + t0.view(-1, 6, block.table.shape[1])[:, :3]).unbind(1)
    c = c + gate[:, None] * mix(block, norm_modulate(c, scale, shift), draw)
    return c, functional.linear(c, *block.after)
