"""Diagonal attention: the DiagAttention of TransNormer (arXiv 2210.10340, section 4.2), which runs softmax inside blocks
of w tokens that do not overlap, in the first half of the layers; the later layers look at everything.

The paper's tokens are words in a row. Here a block may also be w neighbours of the picture (orders tile2d and tile3d),
cut so that every block but the last of a frame, or of the clip, holds exactly w tokens whatever the grid is. Tokens that
are not of the image see everything. Without training this keeps the paper's split and its softmax, not its weights.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...archs import Grid
from ...kernels.attention.reorder import compact_order, inverse
from ._segments import SegmentPlan, serve
from .call import Answer, AttentionCall, Decline

ORDERS = ("tile2d", "tile3d", "none")
OFFSETS = ("none", "alternate_half")
TEXT = ("dense", "none")


@dataclass(frozen=True)
class Diagonal:
    """block w in tokens >= 1; depth: part of the stack, from its start, that it acts on, 0..1."""

    block: int = 64
    depth: float = 0.5
    order: str = "tile2d"
    offset: str = "none"
    text: str = "dense"
    spatial: ClassVar[bool] = True  # means nothing where tokens have no places

    def __post_init__(self):
        if self.order not in ORDERS or self.offset not in OFFSETS or self.text not in TEXT:
            raise ValueError(
                f"order {self.order!r} must be of {ORDERS}, offset {self.offset!r} of {OFFSETS}, text {self.text!r} of {TEXT}."
            )
        if self.block < 1 or not 0 <= self.depth <= 1:
            raise ValueError(f"Diagonal blocks need at least 1 token and depth 0 to 1, got {self.block}, {self.depth}.")

    def blocks(self, grid: Grid, offset: bool = False) -> torch.Tensor:
        """int64 [T * H * W]: diagonal block of each token. offset: the first block of each frame (of the clip, in the
        other orders) holds half as many tokens."""
        frames, each = grid[0], grid[1] * grid[2]
        ahead = self.block - self.block // 2 if offset else 0
        if self.order == "tile2d":
            place = inverse(compact_order((1, *grid[1:]), (self.block,)))
            runs = each // self.block + 2
            return (torch.arange(frames)[:, None] * runs + (place + ahead) // self.block).flatten()
        place = torch.arange(frames * each)
        if self.order == "tile3d":
            place = inverse(compact_order(grid, (self.block,)))
        return (place + ahead) // self.block

    def begin(self) -> dict[Any, SegmentPlan]:
        return {}

    def attend(self, state: dict[Any, SegmentPlan], call: AttentionCall) -> Answer:
        number, count = call.block.number, call.block.count
        if number >= self.depth * count:
            raise Decline("behind the diagonal part of the stack")
        offset = self.offset == "alternate_half" and number % 2 == 1
        return serve(state, call, offset, lambda grid: self.blocks(grid, offset), self.text, "one block holds it all")
