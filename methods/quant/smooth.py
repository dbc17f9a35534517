"""Smoothing: x / s and W * s have the product of x and W, and s moves outliers between them (SmoothQuant,
arXiv 2211.10438):  s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)."""

import torch

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
RANGE = 1e4  # of the factors around their geometric mean: beyond it the halves of a product lose more than they gain


def smooth_scales(inputs: torch.Tensor, weight: torch.Tensor, alpha: float = 0.5) -> torch.Tensor:
    """inputs [K], the largest magnitude of each input channel; weight [N, K], or its largest magnitudes [K] -> s [K] fp32,
    of geometric mean 1. A channel that was never on, or has no weight, gets 1."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"Alpha of smoothing lies between 0 and 1, got {alpha}.")
    columns = weight.abs().amax(0) if weight.ndim == 2 else weight
    if inputs.shape != columns.shape:
        raise ValueError(f"Smoothing needs {[*columns.shape]} input channels, got {[*inputs.shape]}.")
    x, w = inputs.to(weight.device, torch.float32), columns.float()
    live = (x > 0) & (w > 0)
    log = torch.where(live, alpha * x.clamp_min(1e-30).log() - (1 - alpha) * w.clamp_min(1e-30).log(), 0.0)
    log = torch.where(live, log - log.sum() / live.sum().clamp_min(1), 0.0)
    limit = torch.tensor(RANGE).log().item()
    return log.clamp(-limit, limit).exp()
