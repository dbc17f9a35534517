"""Which tokens skip an MLP: those to which it added least, relative to their size, when it was last computed for all.

Dynamic Diffusion Transformer (arXiv 2410.03456) trains a router for this; here the last full evaluation decides."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Share:
    """quantile: share of the tokens that skip; min_active: share that is computed in any case."""

    quantile: float
    min_active: float

    def skipped(self, tokens: int) -> int:
        """Of so many tokens; the same in every row, so that rows stay one batch."""
        return max(0, min(math.floor(self.quantile * tokens + 1e-6), tokens - math.ceil(self.min_active * tokens)))


def contribution(made: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
    """|MLP output| / |residual stream| of each token; both [b, ..., D] -> [b, N] fp32."""
    norms = (torch.linalg.vector_norm(t.flatten(1, -2), dim=-1, dtype=torch.float32) for t in (made, stream))
    return next(norms) / next(norms).clamp_min(1e-12)


def parted(scores: torch.Tensor, skipped: int, among: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """scores [b, N] -> (tokens to compute [b, N - skipped], tokens that skip [b, skipped]), int64, each in its order.

    The lowest scores among the slice skip; of equal ones the first. NaN counts as highest."""
    lowest = scores[:, among].nan_to_num(nan=math.inf).argsort(dim=1, stable=True)[:, :skipped]
    rest = (lowest + (among.start or 0)).sort(dim=1).values
    skips = torch.zeros_like(scores, dtype=torch.uint8).scatter_(1, rest, 1)
    return skips.argsort(dim=1, stable=True)[:, : scores.shape[1] - skipped], rest
