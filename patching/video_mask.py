"""The noise mask of a video LATENT."""

from typing import Any

import comfy.utils
import torch


def video_of(latent: dict[str, Any], node: str) -> torch.Tensor:
    """The latent [B, C, T, H, W]. ValueError for pictures, and for video with sound."""
    samples = latent["samples"]
    if getattr(samples, "is_nested", False):
        raise ValueError(f"{node} takes a video without sound; separate the two and plan the video's latent alone.")
    if samples.ndim != 5:
        raise ValueError(
            f"{node} needs a video latent [B, C, T, H, W], got {[*samples.shape]}; connect an empty video latent."
        )
    return samples


def mask_of(latent: dict[str, Any], node: str) -> torch.Tensor:
    """[B or 1, T, H, W] of a LATENT's noise_mask, 1 where something is made; all ones where there is none."""
    samples = video_of(latent, node)
    mask = latent.get("noise_mask")
    if mask is None:
        return torch.ones(1, *samples.shape[2:])
    wanted = [*samples.shape[2:]]
    if mask.ndim in (
        3,
        4,
    ):  # a MASK, a frame each, as Set Latent Noise Mask leaves it: of any size, the sampler resizes
        mask = mask.reshape(1, 1, -1, *mask.shape[-2:]).float()
        if mask.shape[2] in (1, wanted[0]):
            mask = comfy.utils.reshape_mask(mask, (1, 1, *wanted))
    if mask.ndim != 5 or any(got not in (1, want) for got, want in zip(mask.shape[2:], wanted, strict=True)):
        raise ValueError(
            f"{node}: the noise_mask {[*mask.shape]} is not that of a latent {[*samples.shape]}; plan it again."
        )
    return mask[:, 0].expand(-1, *wanted).float()


def masked(latent: dict[str, Any], mask: torch.Tensor) -> dict[str, Any]:
    """The LATENT with that noise mask [B or 1, T, H, W]; its other entries are kept."""
    return {**latent, "noise_mask": mask[:, None]}
