"""FlowEdit (Kulikov et al., arXiv 2412.08629; as in ACE-Step, arXiv 2506.00045): the source is moved along the difference of
two velocities, one under its own prompt and one under the prompt of the edit, without being inverted.

    z_src = (1 - sigma) x + sigma n        z_tar = z_src + (z - x)        z <- z + (sigma' - sigma) mean_n(v_tar - v_src)"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

Pair = tuple[torch.Tensor, torch.Tensor]
Pairs = Callable[[list[Pair], float], list[Pair]]  # (z_src, z_tar) of each draw, sigma -> their clean predictions
Told = Callable[[int, torch.Tensor, torch.Tensor], None]  # step, z, what z would be at sigma 0
Shown = Callable[
    [torch.Tensor, float, torch.Tensor], torch.Tensor
]  # x, sigma, the noise in it -> x as the model sees it


def span_of(steps: int, n_min: float, n_max: float) -> tuple[int, int]:
    """Shares of the run -> the first step that edits, and the one that no longer does."""
    first = min(int(steps * n_min + 1e-6), steps)
    return first, max(first, min(int(steps * n_max + 1e-6), steps))


@dataclass
class FlowEdit:
    """x [B, ...]: the source. draw(): noise like it. draws: of each step, whose differences are averaged. mask [B, ...]
    0..1: what may move. shown: for models that see the rest otherwise than noised."""

    x: torch.Tensor
    draw: Callable[[], torch.Tensor]
    draws: int = 1
    mask: torch.Tensor | None = None
    shown: Shown | None = None

    def __post_init__(self):
        self.z = self.x
        self.noise = torch.zeros_like(self.x)  # of the last draw

    def pair(self, sigma: float) -> Pair:
        """With the noise of the last draw. z_tar is z_src bit for bit where nothing has moved."""
        source = (1 - sigma) * self.x + sigma * self.noise
        return source, source + (self.z - self.x)

    def seen(self, sigma: float) -> Pair:
        """The pair as the model is given it."""
        source, target = self.pair(sigma)
        if self.shown is None:
            return source, target
        return self.shown(source, sigma, self.noise), self.shown(target, sigma, self.noise)

    def run(self, predict: Pairs, sigmas: list[float], steps: Iterable[int], told: Told) -> None:
        for i in steps:
            sigma, h = sigmas[i], sigmas[i + 1] - sigmas[i]
            pairs = []
            for _ in range(self.draws):
                self.noise = self.draw()
                pairs.append(self.seen(sigma))
            moved = torch.zeros_like(self.x)
            for (source, target), (clean_source, clean_target) in zip(pairs, predict(pairs, sigma), strict=True):
                moved += ((target - clean_target) - (source - clean_source)) / (sigma * self.draws)
            if self.mask is not None:
                moved = moved * self.mask
            told(i, self.z, self.z - sigma * moved)
            self.z = self.z + h * moved
