"""Window attention over the token grid: DiT-3D (arXiv 2307.01831), the shifted windows of LinGen's TESA branch (arXiv
2412.09856) and, with one frame, the local windows of LaMamba-Diff (arXiv 2408.02615).

Image tokens are cut into windows of (wt, wh, ww) that do not overlap; softmax runs inside a window, and over the tokens
that are not of the image, which see everything. With a shift the cuts of every other windowed block lie half a
window further. Nothing wraps around: the windows at a border are smaller, and so are the last ones where the grid does
not divide.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...archs import Grid
from ...kernels.attention.reorder import coordinates
from ._segments import SegmentPlan, serve
from .call import Answer, AttentionCall, Decline

SHIFTS = ("none", "alternate", "always")
TEXT = ("dense", "none")


@dataclass(frozen=True)
class Window3D:
    """wt frames, wh and ww tokens, each >= 1. global_every n: of n blocks the last stays dense, 0: none does."""

    wt: int = 8
    wh: int = 16
    ww: int = 16
    shift: str = "none"
    global_every: int = 2
    text: str = "dense"
    spatial: ClassVar[bool] = True  # means nothing where tokens have no places

    def __post_init__(self):
        if self.shift not in SHIFTS or self.text not in TEXT:
            raise ValueError(f"shift {self.shift!r} must be of {SHIFTS}, text {self.text!r} of {TEXT}.")
        if min(self.window) < 1 or self.global_every < 0:
            raise ValueError(f"Windows need at least 1 token a side and global_every >= 0, got {self}.")

    @property
    def window(self) -> Grid:
        return self.wt, self.wh, self.ww

    def is_global(self, block: int) -> bool:
        return self.global_every > 0 and (block + 1) % self.global_every == 0

    def is_shifted(self, block: int) -> bool:
        """alternate: every other one of the windowed blocks, the first is not."""
        windowed = block - ((block + 1) // self.global_every if self.global_every else 0)
        return self.shift == "always" or (self.shift == "alternate" and windowed % 2 == 1)

    def windows(self, grid: Grid, shifted: bool = False) -> torch.Tensor:
        """int64 [T * H * W]: window of each token. An axis that one window spans has no cut, shifted or not."""
        number = torch.zeros(grid[0] * grid[1] * grid[2], dtype=torch.int64)
        for at, length, size in zip(coordinates(grid).unbind(1), grid, self.window, strict=True):
            ahead = size - size // 2 if shifted and size < length else 0
            number = number * (-(-length // size) + 1) + (at + ahead) // size
        return number

    def begin(self) -> dict[Any, SegmentPlan]:
        return {}

    def attend(self, state: dict[Any, SegmentPlan], call: AttentionCall) -> Answer:
        if self.is_global(call.block.number):
            raise Decline("a global block")
        shifted = self.is_shifted(call.block.number)
        return serve(
            state, call, shifted, lambda grid: self.windows(grid, shifted), self.text, "one window spans it all"
        )
