"""Grey pixels <-> latents of the digit models: a lossless 4x4 pixel shuffle and the affine map that makes the
model's own latent format (Flux for images, Wan 2.1 for video) see pixels in -1..1. No weights."""

import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

PATCH = 4
CHANNELS = PATCH * PATCH
FLUX_SHIFT, FLUX_SCALE = 0.1159, 0.3611
WAN_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


def _affine(latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, std) that broadcast over a latent [B, 16, (T,) H, W]."""
    shape = (1, CHANNELS) + (1,) * (latent.ndim - 2)
    if latent.ndim == 5:
        return latent.new_tensor(WAN_MEAN).view(shape), latent.new_tensor(WAN_STD).view(shape)
    return latent.new_full(shape, FLUX_SHIFT), latent.new_full(shape, 1 / FLUX_SCALE)


def encode(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels 0..1, image [B, H, W] or video [B, T, H, W], sides multiples of 4 -> latent [B, 16, (T,) H/4, W/4]."""
    if pixels.shape[-1] % PATCH or pixels.shape[-2] % PATCH:
        raise ValueError(
            f"The digits codec needs sides that are multiples of {PATCH}, got {pixels.shape[-1]}x{pixels.shape[-2]}."
        )
    latent = pixel_unshuffle((pixels * 2 - 1)[..., None, :, :], PATCH)
    if latent.ndim == 5:
        latent = latent.movedim(1, 2)
    mean, std = _affine(latent)
    return latent * std + mean


def decode(latent: torch.Tensor) -> torch.Tensor:
    """Latent [B, 16, (T,) h, w] -> pixels [B, (T,) 4h, 4w], clamped to 0..1. The inverse of `encode`."""
    if latent.ndim not in (4, 5) or latent.shape[1] != CHANNELS:
        raise ValueError(
            f"Digits Decode needs a latent of {CHANNELS} channels, [B, {CHANNELS}, H, W] or "
            f"[B, {CHANNELS}, T, H, W], got {list(latent.shape)}. Use the VAE of that model."
        )
    mean, std = _affine(latent)
    pixels = (latent - mean) / std
    if pixels.ndim == 5:
        pixels = pixels.movedim(2, 1)
    return ((pixel_shuffle(pixels, PATCH)[..., 0, :, :] + 1) / 2).clamp(0, 1)
