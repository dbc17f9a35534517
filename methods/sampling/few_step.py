"""Schedules and steps of models distilled to a few evaluations.

Multi-step consistency models (Heek et al. 2024; Efficient-vDiT, arXiv 2502.06155; Phased Consistency Model, arXiv
2405.18407) learn to jump to the end of one of S segments of the schedule: sampled on the segments' edges, a jump is
Euler's step. Models distilled by matching distributions (DMD2, LinVideo, arXiv 2510.08318) jump to the clean latent,
which is noised anew to the next sigma."""

import math
from collections.abc import Callable

import torch

EDGES = ("pcm_floor", "uniform_sigma", "uniform_t", "custom")
MODES = ("ode_jump", "renoise", "gamma")
MOST_STEPS = 1000
PRESETS: dict[str, tuple[tuple[float, ...], float]] = {  # timesteps of 1000, and the shift they are taken through
    "wan_dmd_4": ((1000, 750, 500, 250), 8.0),
    "wan_lightx_4": ((1000, 750, 500, 250), 5.0),
    "flux_schnell_4": ((1000, 750, 500, 250), 1.0),
    "turbo_8": ((1000, 875, 750, 625, 500, 375, 250, 125), 3.0),
}


def shifted(t: float, shift: float) -> float:
    """The sigma of a flow at part t of the schedule: shift t / (1 + (shift - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def segment_points(edges: str, segments: int, grid: int, sigma: Callable[[float], float]) -> list[float]:
    """Parts t of the schedule, 1 (noise) down to 0, at which the segments begin, and 0. sigma: of such a part, at most 1.

    pcm_floor: points floor(i grid / S) of `grid` even steps; uniform_t: evenly spaced; uniform_sigma: such that the
    sigmas are."""
    if edges == "pcm_floor":
        if segments > grid:
            raise ValueError(f"segments {segments} must be at most grid {grid}; raise grid.")
        return [*(1 - i * grid // segments / grid for i in range(segments)), 0.0]
    if edges == "uniform_t":
        return [1 - i / segments for i in range(segments + 1)]
    most = sigma(1.0)
    return [_inverse(sigma, most * (1 - i / segments)) for i in range(segments)] + [0.0]


def _inverse(sigma: Callable[[float], float], wanted: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sigma(middle) < wanted else (low, middle)
    return high


def numbers(text: str, name: str, most: float) -> list[float]:
    """Falling numbers with commas between them, above 0 up to `most`; a last 0 may stand. ValueError for others."""
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(
            f"{name} {text!r} must be numbers with commas between them, such as {most:g}, {most / 2:g}."
        ) from error
    if found and found[-1] == 0:
        found.pop()
    falling = all(a > b for a, b in zip(found, found[1:], strict=False))
    if not 1 <= len(found) <= MOST_STEPS or not falling or not all(math.isfinite(v) and 0 < v <= most for v in found):
        raise ValueError(
            f"{name} {text!r} must be falling numbers above 0 and at most {most:g}; write for example {most:g}, {most / 2:g}."
        )
    return found


def tail(points: list[float], denoise: float) -> tuple[list[float], float]:
    """(the points of a partial denoise, the denoise that this is): it starts at the edge nearest to `denoise`, for between
    two edges the model has learnt no jump. points fall from 1 to 0."""
    if denoise <= 0:
        return [], 0.0
    start = min(range(len(points) - 1), key=lambda i: (abs(points[i] - denoise), i))
    return points[start:], points[start]


def jump(x: torch.Tensor, denoised: torch.Tensor, sigma: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Euler's step of the flow through x [B, ...] at sigma to the next one."""
    return x + (x - denoised) / sigma * (following - sigma)


def mixed(jumped: torch.Tensor, noised: torch.Tensor, clean: torch.Tensor, gamma: float) -> torch.Tensor:
    """All [B, ...] at one sigma: what the jump gave (its own noise), the clean latent under fresh noise, and under none ->
    the clean latent under sqrt(1 - gamma^2) of its own noise and gamma of fresh noise, whose variance is the same."""
    kept = math.sqrt(1.0 - gamma * gamma)
    return kept * jumped + gamma * noised + (1.0 - kept - gamma) * clean
