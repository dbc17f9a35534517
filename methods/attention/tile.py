"""Attention Tile of Efficient-vDiT (arXiv 2502.06155, section 3): the attention map of F latent frames is F x F tiles,
and those on the diagonal dominate. A tile (a, b) is kept where a = b, or where a or b is one of k reference frames, so

    kept tiles = k F + (F - k) (k + 1),

linear in F. Tokens that are not of the image see everything. Which frames are references the paper does not say: here
they are spread evenly from the first to the last ("even"), or the k first or last ones.

How many references a block needs depends on the block and hardly on the prompt. A plan gives each block its own number,
as JSON: {"blocks": {"0": "dense", "1": 2, ...}}, or the inner object alone. Blocks that it does not name stay dense.
"""

import functools
import json
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...archs import Grid
from ._segments import FREE, SegmentPlan, serve
from .call import Answer, AttentionCall, Decline

LAYOUTS = ("even", "first", "last")
DENSE = "dense"
MADE_FOR = ("frames", "ref_layout")  # in a plan, beside its blocks


def references(frames: int, k: int, layout: str = "even") -> list[int]:
    """The k reference frames of F, ascending; all where k >= F."""
    if k >= frames:
        return list(range(frames))
    if layout == "first":
        return list(range(k))
    if layout == "last":
        return list(range(frames - k, frames))
    return [(2 * i * (frames - 1) + k - 1) // (2 * (k - 1)) for i in range(k)] if k > 1 else [0][:k]


def kept_tiles(frames: int, k: int) -> int:
    """Tiles of F x F that are computed."""
    return frames * frames if k >= frames else k * frames + (frames - k) * (k + 1)


def frames_of(grid: Grid, k: int, layout: str = "even") -> torch.Tensor:
    """int64 [T * H * W]: the frame of each token, FREE in reference frames."""
    frame = torch.arange(grid[0])
    frame[references(grid[0], k, layout)] = FREE
    return frame.repeat_interleave(grid[1] * grid[2])


def parse_plan(text: str) -> dict[int, int | None]:
    """JSON of a plan -> reference frames by block, None: dense. ValueError names what cannot be read."""
    try:
        found = json.loads(text)
        blocks = found.get("blocks", found)
        plan = {int(block): None if k == DENSE else _count(k) for block, k in blocks.items() if block not in MADE_FOR}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            'plan: cannot read it; paste what Attention Tile Search gave, or write {"blocks": {"0": "dense", "1": 2}} with '
            f"the reference frames of each block. It is: {text.strip()[:60]!r}"
        ) from error
    if min(plan, default=0) < 0:
        raise ValueError(f"plan: there is no block {min(plan)}.")
    return plan


def _count(k: Any) -> int:
    if isinstance(k, bool) or not isinstance(k, int) or k < 0:
        raise ValueError(f"{k!r} is no count")
    return k


def write_plan(blocks: dict[int, int | None], frames: int, layout: str) -> str:
    """JSON that parse_plan reads; frames and layout are what it was made for."""
    named = {str(n): DENSE if k is None else k for n, k in sorted(blocks.items())}
    return json.dumps({"frames": frames, "ref_layout": layout, "blocks": named})


@dataclass(frozen=True)
class Tile:
    """k reference frames >= 0 for every block, or a plan's, where `plan` is not empty."""

    ref_frames: int = 2
    layout: str = "even"
    plan: str = ""
    spatial: ClassVar[bool] = True  # means nothing where tokens have no places

    def __post_init__(self):
        if self.layout not in LAYOUTS or self.ref_frames < 0:
            raise ValueError(
                f"Reference frames are 0 or more, laid out {LAYOUTS}; got {self.ref_frames}, {self.layout!r}."
            )
        _ = self.blocks, self.placed  # a plan that cannot be read is refused here

    @property
    def planned(self) -> bool:
        return bool(self.plan.strip())

    @functools.cached_property
    def blocks(self) -> dict[int, int | None]:
        """The plan; empty without one."""
        return parse_plan(self.plan) if self.planned else {}

    @functools.cached_property
    def placed(self) -> str:
        """Where reference frames are: as the plan was made for, if it says so."""
        told = json.loads(self.plan).get("ref_layout", self.layout) if self.planned else self.layout
        if told not in LAYOUTS:
            raise ValueError(f"plan: ref_layout {told!r} is none of {LAYOUTS}.")
        return told

    def begin(self) -> dict[Any, SegmentPlan]:
        return {}

    def attend(self, state: dict[Any, SegmentPlan], call: AttentionCall) -> Answer:
        k = self.blocks.get(call.block.number) if self.planned else self.ref_frames
        if k is None:
            raise Decline("dense in the plan")
        if call.layout is not None and call.layout.grid[0] == 1:
            raise Decline("a single frame")
        tile = lambda grid: frames_of(grid, k, self.placed)  # noqa: E731
        return serve(state, call, k, tile, DENSE, "every frame sees every frame")
