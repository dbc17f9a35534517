"""Panels of one picture that share positions (DiffDecompose's position cloning, arXiv 2505.21541).

A canvas of so many equal panels is one sequence of tokens. Panel p takes the positions of the panel place clone[p]: two
panels with the same number see a token of the other at distance 0 where it lies at the same place of its panel. The
first axis of the positions, which stock pictures leave at 0, can tell panels apart again: it is index[p].
"""

from dataclasses import dataclass

import torch

MOST = 6


@dataclass(frozen=True)
class Panels:
    """clone, index: for each panel the place whose positions it takes, from 0, and what is added on the first axis."""

    clone: tuple[int, ...]
    index: tuple[int, ...]
    axis: str = "width"

    @property
    def count(self) -> int:
        return len(self.clone)

    @property
    def plain(self) -> bool:
        """Whether the positions are the stock ones."""
        return self.clone == tuple(range(self.count)) and not any(self.index)

    def size(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """Tokens (1, h, w) of one panel of a canvas of that grid. ValueError where the panels do not fill it."""
        t, h, w = grid
        along = w if self.axis == "width" else h
        if t != 1 or along % self.count:
            raise ValueError(
                f"In-Context Panels cannot cut a canvas of {h} x {w} tokens (height x width) into {self.count} equal "
                f"panels along its {self.axis}. Sample the LATENT of the node, or one whose {self.axis} is a multiple of "
                f"{self.count} tokens."
            )
        return (1, h, w // self.count) if self.axis == "width" else (1, h // self.count, w)

    def covered(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """Tokens (1, h, w) that the positions in use reach over: two places, however many panels share them."""
        t, h, w = grid
        places = max(self.clone) - min(self.clone) + 1
        _, high, wide = self.size(grid)
        return (t, h, places * wide) if self.axis == "width" else (t, places * high, w)

    def moved(self, ids: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """Stock positions [B, N or more, A] of a canvas -> a copy with the panels' own. What follows the image stays."""
        _, high, wide = self.size(grid)
        tokens = grid[1] * grid[2]
        image = ids[:, :tokens].unflatten(1, grid[1:])  # [B, H, W, A]
        axis, length = (2, wide) if self.axis == "width" else (1, high)
        places = image.split(length, axis)
        index = torch.zeros(ids.shape[-1], dtype=ids.dtype, device=ids.device)
        made = []
        for place, first in zip(self.clone, self.index, strict=True):
            index = index.clone()
            index[0] = first
            made.append(places[place] + index)
        return torch.cat((torch.cat(made, axis).flatten(1, 2), ids[:, tokens:]), 1)


def stock(ids: torch.Tensor, grid: tuple[int, int, int]) -> bool:
    """Whether the first positions [B, N or more, A >= 3] are an even grid of (h, w) on the second and third axis, and
    one number on the first, as FLUX numbers a picture: also where it is scaled or shifted as a whole."""
    if ids.ndim != 3 or ids.shape[-1] < 3 or ids.shape[1] < grid[1] * grid[2]:
        return False
    image = ids[:, : grid[1] * grid[2]].unflatten(1, grid[1:]).double()
    first, rows, columns = image[..., 0], image[..., 1], image[..., 2]
    even = all(_even(line) for line in (rows[:, :, 0], columns[:, 0]))
    same = (first == first[:, :1, :1]).all() and (rows == rows[:, :, :1]).all() and (columns == columns[:, :1]).all()
    return bool(even and same)


def _even(line: torch.Tensor) -> bool:
    """line [B, n] rises in equal steps."""
    steps = line.diff(dim=1)
    return not steps.numel() or bool((steps > 0).all() and (steps - steps[:, :1]).abs().max() < 1e-3 * steps.max())


def numbers(text: str, count: int, name: str, highest: int) -> tuple[int, ...]:
    """ "0,0,1" -> (0, 0, 1). ValueError, one sentence, unless it is that many whole numbers from 0 to `highest`."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != count or not all(part.isdecimal() and len(part) < 4 and int(part) <= highest for part in parts):
        example = ",".join("0" for _ in range(count))
        raise ValueError(
            f"{name}: {text!r} is not a list of {count} whole numbers from 0 to {highest}, one for each panel. Write one "
            f"like {example!r}."
        )
    return tuple(int(part) for part in parts)


def parse(panels: int, axis: str, clone: str, index: str) -> Panels:
    """The node's inputs. clone "all", "none" or a list; index a list, or "" for 0 throughout."""
    if not 1 <= panels <= MOST:
        raise ValueError(f"panels {panels} must be from 1 to {MOST}.")
    word = clone.strip().lower()
    if word in ("all", "none"):
        places = (0,) * panels if word == "all" else tuple(range(panels))
    else:
        places = numbers(clone, panels, "clone", panels - 1)
    return Panels(places, numbers(index, panels, "index_per_panel", 999) if index.strip() else (0,) * panels, axis)


def chosen(text: str, count: int) -> tuple[int, ...]:
    """Numbers of the panels held clean: "" none, "0,2". ValueError where a panel is not there or named twice."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(p.isdecimal() and int(p) < count for p in parts) or len({*map(int, parts)}) < len(parts):
        raise ValueError(
            f"clean_panels: {text!r} is not a list of different panels from 0 to {count - 1}. Write one like '0', or "
            "nothing."
        )
    return tuple(int(p) for p in parts)


def canvas(
    panel: torch.Tensor,
    mask: torch.Tensor | None,
    layout: Panels,
    clean: torch.Tensor | None = None,
    held: tuple[int, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """panel [B, C, h, w] and its mask [B or 1, 1, h, w] (1 is drawn) -> the canvas, and its mask where there is one.

    clean [K or 1, C, h, w]: what the panels `held` keep, in that order; one for all of them."""
    axis = -1 if layout.axis == "width" else -2
    parts = [panel] * layout.count
    if not held and mask is None:
        return torch.cat(parts, axis), None
    free = torch.ones_like(panel[:1, :1]) if mask is None else mask.to(panel)
    masks = [free] * layout.count
    for order, number in enumerate(held):
        assert clean is not None
        kept = clean[order if len(clean) > 1 else 0]
        parts[number] = kept.to(panel).expand_as(panel)
        masks[number] = torch.zeros_like(free)
    return torch.cat(parts, axis), torch.cat(masks, axis)
