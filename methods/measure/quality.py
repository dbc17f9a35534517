"""Differences between two runs as numbers: relative error of latents, PSNR and SSIM of what was decoded."""

import math

import torch
from torch.nn.functional import conv2d

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # Wang et al. 2004
C1, C2 = 0.01**2, 0.03**2  # for values in 0..1


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """|b - a| / |a| over all elements, in fp64; 0 for equal tensors. Shapes must match."""
    if a.shape != b.shape:
        raise ValueError(f"Cannot compare {list(a.shape)} with {list(b.shape)}; both runs need the same latent.")
    a, b = a.double(), b.double()
    difference = (b - a).norm()
    return 0.0 if difference == 0 else (difference / a.norm().clamp_min(1e-12)).item()


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in 0..1; inf for equal images."""
    error = (a.double() - b.double()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean structural similarity of images [N, H, W, C] in 0..1: Gaussian window of 11 pixels, sigma 1.5, smaller
    images use the largest odd window that fits. 1 for equal images."""
    if a.shape != b.shape:
        raise ValueError(f"Cannot compare images {list(a.shape)} with {list(b.shape)}; both need the same size.")
    side = min(SSIM_WINDOW, a.shape[1], a.shape[2])
    kernel = _gaussian(side - 1 + side % 2).to(a.device)
    scores = [_ssim_one(x, y, kernel) for x, y in zip(a, b, strict=True)]  # one image at a time bounds memory
    return torch.stack(scores).mean().item()


def _gaussian(side: int) -> torch.Tensor:
    at = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
    row = torch.exp(-at.square() / (2 * SSIM_SIGMA**2))
    row = row / row.sum()
    return (row[:, None] * row[None, :])[None, None]


def _ssim_one(a: torch.Tensor, b: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    x, y = (t.float().movedim(-1, 0)[:, None] for t in (a, b))  # [C, 1, H, W]
    blur = lambda t: conv2d(t, kernel)  # noqa: E731
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    score = ((2 * mx * my + C1) * (2 * cov + C2)) / ((mx * mx + my * my + C1) * (vx + vy + C2))
    return score.mean()


def similarity(a: torch.Tensor, b: torch.Tensor) -> float:
    """How alike two latents [B, C, (T,) H, W] are, 1 for equal ones: SSIM of their channels, each scaled to the range that it
    has in a; of latents without a plane, 1 - relative error. 0 where b is not finite."""
    if not b.isfinite().all():
        return 0.0
    if a.ndim < 4 or min(a.shape[-2:]) < 3:
        return max(0.0, 1.0 - relative_error(a, b))
    dims = tuple(n for n in range(a.ndim) if n != 1)
    low, high = a.amin(dims, keepdim=True), a.amax(dims, keepdim=True)
    planes = [((x - low) / (high - low).clamp_min(1e-6)).clamp(0, 1).movedim(1, -1) for x in (a.float(), b.float())]
    return ssim(*(p.reshape(-1, *p.shape[-3:]) for p in planes))
