"""LTX Denoising Decode: LTX-Video's decoder takes the last noise away (arXiv 2501.00103). The latent gets a little noise,
z' = (1 - s) z + s e, and the decoder is told how much of it is left. ComfyUI draws e anew at every decode, from torch's
global generator, and takes s and the timestep from the file; here the node says both, and the seed."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.utils
import torch
from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE

from .sampling import Progress

NAME = "LTX Denoising Decode"
NOISES = ("each_frame", "same_in_all")
INSIDE = 0x5DEECE66D  # turns the seed into that of the noise that some decoders draw inside
FORKED = ("cuda", "xpu")  # devices with generators of their own that torch can fork


@dataclass(frozen=True)
class Asked:
    """timestep and scale 0..1; tile and overlap in pixels, temporal ones in frames, 0 for the whole."""

    timestep: float
    scale: float
    seed: int
    noise: str
    tile: int = 0
    overlap: int = 0
    temporal_tile: int = 0
    temporal_overlap: int = 0


def conditioned(vae: Any) -> bool:
    """Whether that VAE takes a timestep: those of LTX-Video from 0.9.1 on. ValueError for one of another model."""
    inner = getattr(vae, "first_stage_model", None)
    if not isinstance(inner, VideoVAE):
        raise ValueError(
            f"{NAME} needs the VAE of LTX-Video, got {type(inner).__name__}; decode this latent with VAE Decode."
        )
    return bool(inner.timestep_conditioning)


def video_of(latent: dict[str, Any], vae: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(latent [B, C, T, H, W], noise mask of any shape or None); of video with sound the video's. ValueError for others."""
    samples, mask = latent["samples"], latent.get("noise_mask")
    if getattr(samples, "is_nested", False):
        samples = samples.unbind()[0]
        if getattr(mask, "is_nested", False):
            mask = mask.unbind()[0]
    if samples.ndim != 5 or samples.shape[1] != vae.latent_channels:
        raise ValueError(
            f"{NAME} needs a latent [B, {vae.latent_channels}, T, H, W], got {[*samples.shape]}; connect one of LTX-Video."
        )
    return samples, mask


def noised(samples: torch.Tensor, mask: torch.Tensor | None, asked: Asked, indices: list[int] | None) -> torch.Tensor:
    """(1 - s) z + s e in fp32, s times the mask where there is one; as it is at s = 0. indices: places of these samples
    in the batch that they were taken from, as Latent From Batch notes them. Sets torch's generator. No kernel of its own:
    the latent is a thousandth of what the decoder then moves."""
    if asked.scale == 0:
        return samples
    latent = samples.float()
    drawn = comfy.sample.prepare_noise(
        latent[:, :, :1] if asked.noise == "same_in_all" else latent, asked.seed, indices
    )
    drawn = drawn.to(latent.device)
    scale = asked.scale
    if mask is not None:
        scale = scale * comfy.utils.reshape_mask(mask.to(latent), latent.shape).clamp(0, 1)
    return latent * (1.0 - scale) + drawn * scale


@contextmanager
def told(vae: Any, timestep: float):
    """The decoder adds no noise and takes this timestep; torch's generators, and the VAE, which other graphs share, are as
    before afterwards."""
    inner, kind = vae.first_stage_model, vae.device.type
    kind = kind if kind in FORKED else "cuda"
    before = inner.decode_noise_scale, inner.decode_timestep
    with torch.random.fork_rng(devices=range(getattr(torch, kind).device_count()), device_type=kind):
        try:
            inner.decode_noise_scale, inner.decode_timestep = 0.0, timestep
            yield
        finally:
            inner.decode_noise_scale, inner.decode_timestep = before


def tiles(vae: Any, shape: torch.Size, asked: Asked) -> dict[str, int] | None:
    """What decode_tiled takes, in latent places; None for the whole at once. An overlap is at most a quarter of the tile's
    side, half of its frames."""
    if not asked.tile and not asked.temporal_tile:
        return None
    side, frames = vae.spacial_compression_decode(), vae.temporal_compression_decode()
    across, long = max(shape[3:]), shape[2]
    if asked.tile:
        across = max(2, asked.tile // side)
    if asked.temporal_tile:
        long = max(2, asked.temporal_tile // frames)
    return {
        "tile_x": across, "tile_y": across, "overlap": min(asked.overlap // side, across // 4),
        "tile_t": long, "overlap_t": max(1, min(asked.temporal_overlap // frames, long // 2)),
    }  # fmt: skip


def decode(latent: dict[str, Any], vae: Any, asked: Asked) -> torch.Tensor:
    """LATENT -> frames [B T, H, W, 3] in 0..1. One clip at a time, as core's decoder takes one timestep a call."""
    takes = conditioned(vae)
    samples, mask = video_of(latent, vae)
    plan = tiles(vae, samples.shape, asked)
    progress = Progress(len(samples))
    made = []
    with told(vae, asked.timestep):
        if takes:
            samples = noised(samples, mask, asked, latent.get("batch_index"))
        for one in samples.split(1):
            torch.manual_seed(asked.seed ^ INSIDE)
            made.append(vae.decode(one) if plan is None else vae.decode_tiled(one, **plan))
            progress.step()
    return (torch.cat(made) if len(made) > 1 else made[0]).flatten(0, 1)
