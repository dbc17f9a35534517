"""How much a picture changes where a part of its control is left out, and the chart of all parts."""

from collections.abc import Sequence

import torch
from torch.nn.functional import conv2d, max_pool2d

from .heat_map import heat_map
from .quality import relative_error

METRICS = ("latent_l2", "cosine", "edge_f1")
EDGES = 0.9  # share of a picture that is no edge
SOBEL = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])


def cosine_change(full: torch.Tensor, cut: torch.Tensor) -> float:
    """1 - cosine of two latents [B, ...], the mean over the batch; 0 for equal ones."""
    if torch.equal(full, cut):
        return 0.0
    a, b = full.flatten(1).double(), cut.flatten(1).double()
    return float((1 - torch.nn.functional.cosine_similarity(a, b, dim=1)).clamp_min(0).mean())


def gradients(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [N, H, W] -> how steep they are at each pixel [N, H, W]."""
    kernels = torch.stack((SOBEL, SOBEL.t()))[:, None].to(pictures)
    padded = torch.nn.functional.pad(pictures[:, None], (1, 1, 1, 1), mode="replicate")
    return conv2d(padded, kernels).square().sum(1).sqrt()


def edge_change(full: torch.Tensor, cut: torch.Tensor) -> float:
    """1 - F1 of the edges of two sets of pictures [N, H, W]: the steepest tenth of the first, and where the second is as
    steep. An edge is found within one pixel. 0 for equal ones."""
    if torch.equal(full, cut):
        return 0.0
    a, b = gradients(full.float()), gradients(cut.float())
    limit = torch.quantile(a.flatten(1)[:, :: max(1, a[0].numel() // 100_000)], EDGES, dim=1).view(-1, 1, 1)
    a, b = a > limit, b > limit
    if not a.any() and not b.any():
        return 0.0
    near_a, near_b = (max_pool2d(e[:, None].float(), 3, 1, 1)[:, 0] > 0 for e in (a, b))
    precision = float((b & near_a).sum() / b.sum().clamp_min(1))
    recall = float((a & near_b).sum() / a.sum().clamp_min(1))
    return 1.0 if precision + recall == 0 else 1 - 2 * precision * recall / (precision + recall)


def change(metric: str, full: torch.Tensor, cut: torch.Tensor) -> float:
    """Of latents [B, ...], or of pictures [N, H, W] for edge_f1; 0 where nothing changed."""
    if metric == "edge_f1":
        return edge_change(full, cut)
    return relative_error(full, cut) if metric == "latent_l2" else cosine_change(full, cut)


def chart(
    title: list[str], names: Sequence[str], scores: Sequence[Sequence[float]], ranks: Sequence[int]
) -> torch.Tensor:
    """[1, H, W, 3]: a row for each part with its scores (one for each seed) as shares of the largest; a bar's colour."""
    most = max((score for row in scores for score in row), default=0.0)
    mean = [sum(row) / len(row) for row in scores]
    columns = [f"seed {i + 1}" for i in range(len(scores[0]))] + ["mean"]
    rows: list[tuple[str, list[float | None], str]] = [
        (name, [score / most if most else 0.0 for score in (*row, m)], f"{rank}. {m:.4g}")
        for name, row, m, rank in zip(names, scores, mean, ranks, strict=True)
    ]
    return heat_map(title, "left out", columns, rows, "rank, change")
