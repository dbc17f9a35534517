"""Which image tokens a step of Region-Adaptive Sampling computes (arXiv 2502.10389, section 3; microsoft/RAS @a9c5ec8).
Nothing here knows a model: tokens lie in a grid (T, H, W), row-major, and a latent is cut into patches (t, h, w)."""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import adaptive_max_pool2d, avg_pool3d

METRICS = ("std", "l2norm", "delta_norm")
KEEPS = ("high", "low", "mixed")
RATIOS = ("constant", "linear_up", "linear_down")
SPREAD = (
    0.6  # what the logarithm of a metric may lie from its median: a starved token passes any other within a few steps
)
ROUNDED = 16  # tokens are rounded to at most this part of a picture, so that small ones are served too

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Choice:
    """How active tokens are chosen.

    keep:       which end of the metric is computed; mixed: `mixed` of the active tokens come from the low end.
    starvation: added to a token's logarithmic score for each step it was left out (the paper's exp(k D)), whichever
                end is kept: the official code multiplies before it takes the highest away, which starves them.
    """

    ratio: float = 0.5
    metric: str = "std"
    keep: str = "high"
    mixed: float = 0.3
    starvation: float = 0.5
    round_to: int = 64
    schedule: str = "constant"

    def count(self, tokens: int, at: float = 0.5) -> int:
        """Active tokens of so many, `at` 0 to 1 through the steps that leave tokens out: a multiple of round_to."""
        swing = min(self.ratio, 1 - self.ratio) / 2 * {"constant": 0, "linear_up": 1, "linear_down": -1}[self.schedule]
        share = self.ratio + swing * (2 * at - 1)
        unit = min(self.round_to, max(1, tokens // ROUNDED))
        return min(tokens, max(unit, math.ceil(round(share * tokens, 6) / unit) * unit))

    def choose(
        self, measured: torch.Tensor, left_out: torch.Tensor, always: torch.Tensor | None, count: int
    ) -> torch.Tensor:
        """measured, left_out [b, N] fp32; always bool [b, N]; count <= N -> int64 [b, count], ascending. Tokens of
        `always` come first; count must not be less than any sample has of them."""
        level = measured.clamp_min(1e-12).log()
        level = level - level.median(-1, keepdim=True).values
        level = SPREAD * torch.tanh(level / SPREAD)
        first = torch.zeros_like(level) if always is None else always.float() * 1e6
        hungry = first + self.starvation * left_out
        if self.keep != "mixed":
            score = hungry + (level if self.keep == "high" else -level)
            return score.topk(count, -1).indices.sort(-1).values
        low = int(round(self.mixed * count))
        high = (hungry + level).topk(count - low, -1).indices
        rest = (hungry - level).scatter(-1, high, float("-inf"))
        return torch.cat((high, rest.topk(low, -1).indices), -1).sort(-1).values


def sparse_steps(steps: int, start: int, reset_every: int, resets: frozenset[int] | None = None) -> list[bool]:
    """Whether each of so many steps may leave tokens out. The first `start` steps are dense, then the given ones, or
    where none are given every reset_every-th from the last of the first ones on."""
    if resets is not None:
        return [s >= start and s not in resets for s in range(steps)]
    return [s >= start and not (reset_every and (s - start + 1) % reset_every == 0) for s in range(steps)]


def parse_resets(text: str) -> frozenset[int] | None:
    """Steps from 0, separated by commas; None where nothing is written. ValueError where it is no list of steps."""
    parts = [p.strip() for p in text.split(",") if p.strip()]
    if not all(p.isdecimal() for p in parts):
        raise ValueError(f"reset_steps holds steps from 0, separated by commas, as in 12, 22; got {text!r}.")
    return frozenset(map(int, parts)) if parts else None


def ages(left_out: torch.Tensor, active: torch.Tensor | None) -> torch.Tensor:
    """How many steps each token [b, N] has been left out, after a step with these active [b, M]; None: all."""
    return torch.zeros_like(left_out) if active is None else (left_out + 1).scatter(-1, active, 0.0)


def measure(v: torch.Tensor, before: torch.Tensor | None, metric: str, patch: Grid) -> torch.Tensor:
    """A model's prediction v [b, C, (T,) H, W], and the one before it, -> the metric of each token [b, N], fp32: mean
    over its patch of the spread, or of the length, or of the length of the change, over channels. Patches at a ragged
    edge count what they hold."""
    v = v.float() if metric != "delta_norm" or before is None else v.float() - before.float()
    each = v.std(1, correction=0) if metric == "std" else v.norm(dim=1)
    each = each if each.ndim == 4 else each[:, None]
    return avg_pool3d(each[:, None], patch, ceil_mode=True, count_include_pad=False).flatten(1)


def latent_mask(active: torch.Tensor, grid: Grid, patch: Grid, shape: tuple[int, ...]) -> torch.Tensor:
    """Active tokens [b, M] -> bool over the latent [b, 1, (T,) H, W] of that shape [b, C, (T,) H, W]."""
    chosen = torch.zeros(active.shape[0], math.prod(grid), dtype=torch.bool, device=active.device)
    chosen = chosen.scatter(-1, active, True).unflatten(-1, grid)
    for axis, n in enumerate(patch, 1):
        chosen = chosen.repeat_interleave(n, axis)
    chosen = chosen[:, : shape[-3] if len(shape) == 5 else 1, : shape[-2], : shape[-1]]
    return chosen[:, None] if len(shape) == 5 else chosen


def region_tokens(mask: torch.Tensor, grid: Grid, samples: int) -> torch.Tensor:
    """A MASK [F, H, W] -> bool [b, N]: tokens that it touches. One picture serves all samples and frames; as many as
    samples (pictures) serve one each; otherwise they are a clip, spread over the frames."""
    t, h, w = grid
    touched = adaptive_max_pool2d(mask[:, None].float(), (h, w))[:, 0] > 0.5  # [F, h, w]
    if t == 1 and len(touched) == samples:
        return touched.flatten(1)
    at = (torch.arange(t) * len(touched)) // t
    return touched[at.to(touched.device)].flatten()[None].expand(samples, -1)
