"""The masks that Run Report draws: of each attention plan the one of its last served call, kept as a few kB or as the
rule that makes it, and drawn when a report asks."""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..methods.attention.call import Answer, AttentionCall
from ..methods.attention.picture import Picture

Sketch = Callable[[], dict[str, Any]]  # draws; holds nothing of a device


@dataclass
class Drawing:
    """Of one plan in one run. Which call will be the last nobody knows: the ones at the highest block served so far are
    looked at, so that after the first evaluation it is one block of each."""

    block: int = -1
    step: int = 0
    picture: Picture | None = None

    def see(self, call: AttentionCall, answer: Answer) -> None:
        """Waits for no GPU: a mask that its lists tell is pooled on their device, and is 9 kB there."""
        if answer.picture is None or call.block.number < self.block:
            return
        self.block, self.step = call.block.number, call.forward.run.clock.step
        found = answer.picture()
        if isinstance(found.shares, torch.Tensor):
            found = Picture(shades(found.shares), found.heads, found.order, found.note)
        self.picture = found

    def sketch(self, steps: int) -> Sketch | None:
        """The copy from the device, at the end of the run."""
        if self.picture is None:
            return None
        picture, place = self.picture, f"Step {self.step + 1} of {steps}, block {self.block}, {self.picture.heads}"
        if isinstance(picture.shares, torch.Tensor):
            picture = Picture(picture.shares.cpu(), picture.heads, picture.order, picture.note)
        return lambda: told(picture, place)


def shades(shares: torch.Tensor) -> torch.Tensor:
    """0..1 -> uint8; what is not 0 stays so."""
    return torch.where(shares > 0, (255 * shares).round().clamp(1, 255), 0.0).to(torch.uint8)


def told(picture: Picture, place: str) -> dict[str, Any]:
    """JSON-ready: `cells` are rows x columns bytes in base64, row by row, 255 where all pairs are looked at."""
    cells = picture.shares if isinstance(picture.shares, torch.Tensor) else shades(picture.shares())
    words = [f"{place}.", f"Rows are queries, columns keys: {picture.order}.", picture.note]
    return {
        "rows": cells.shape[0],
        "columns": cells.shape[1],
        "cells": base64.b64encode(bytes(cells.flatten().tolist())).decode(),
        "caption": " ".join(filter(None, words)),
    }
