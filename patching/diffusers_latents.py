"""Latents of bridged models: the format of the class, with the scale that the autoencoder's config beside it tells, or
that config alone for an autoencoder that ComfyUI does not know."""

from typing import Any

import comfy.latent_formats as formats
import torch


class SanaLatents(formats.LatentFormat):
    """The deep-compression autoencoder of Sana: 32 channels, 32 pixels a side."""

    scale_factor = 0.41407
    latent_channels = 32
    spacial_downscale_ratio = 32


class StillLatents(formats.SD15):
    """Stable Diffusion's latents, frame by frame."""

    latent_dimensions = 3


class OwnLatents(formats.LatentFormat):
    """Of any autoencoder, from its config: (latent - shift) x scale, as diffusers' pipelines have it."""

    def __init__(self, channels: int, dimensions: int, scale: float, shift: float):
        self.latent_channels, self.latent_dimensions = channels, dimensions
        self.scale_factor, self.shift_factor = scale, shift

    def process_in(self, latent: torch.Tensor) -> torch.Tensor:
        return (latent - self.shift_factor) * self.scale_factor

    def process_out(self, latent: torch.Tensor) -> torch.Tensor:
        return latent / self.scale_factor + self.shift_factor


def latents_of(name: str, row: Any, config: dict[str, Any], autoencoder: dict[str, Any] | None) -> formats.LatentFormat:
    """row: of this class in the table. ValueError where nothing tells the format."""
    latents, channels = row.latents(config), config["in_channels"] // row.channels
    told = autoencoder or {}
    scale, shift = told.get("scaling_factor"), told.get("shift_factor")
    for value, least in ((scale, 0), (shift, -100)):
        if value is not None and (type(value) not in (int, float) or not least < value < 100):
            raise ValueError(f"vae/config.json says {value!r} for the scale of its latents. Download it again.")
    if latents is None and name == "PixArtTransformer2DModel" and scale is not None:
        latents = formats.SD15() if scale == 0.18215 else formats.SDXL()
    if latents is None or latents.latent_channels != channels:
        if told.get("latent_channels") == channels and not told.get("latents_mean"):
            return OwnLatents(channels, len(row.patch(config)), 1.0 if scale is None else scale, shift or 0.0)
        usual = (
            "more than one possible autoencoder" if latents is None else f"usually {latents.latent_channels} channels"
        )
        raise ValueError(
            f"The latents of {name} with {channels} channels are not known: it has {usual}. Put its vae/config.json beside "
            "the transformer's folder, as in a whole pipeline."
        )
    if scale is not None and latents.scale_factor != 1.0:  # 1: formats that know a mean and a spread for each channel
        latents.scale_factor = scale
    if shift is not None and hasattr(latents, "shift_factor"):
        latents.shift_factor = shift
    return latents
