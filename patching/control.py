"""What control adapters share: when they act, how strongly, and their condition in the model's own latent space."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from comfy_api.latest import io

from .run import Feature, Run

EasyControlSocket = io.Custom("TESSERA_EASYCONTROL")


@dataclass(frozen=True, eq=False)
class ControlFeature(Feature):
    """An adapter that adds a condition to a MODEL. Where it does not act, the MODEL is the base bit for bit.

    parts: it cuts its condition to the part of the picture that a call computes (Forward.part)."""

    parts: ClassVar[bool] = False

    strength: float = 1.0
    percents: tuple[float, float] = (0.0, 1.0)  # part of the noise schedule in which it acts

    def acts(self, run: Run) -> bool:
        """Whether it acts at the evaluation that the clock stands at."""
        start, end = (run.percent_to_sigma(p) for p in self.percents)
        return self.strength != 0 and end < run.clock.sigma <= start


def when_inputs() -> list[Any]:
    """The part of the noise schedule, under the names that core's ControlNet node uses."""
    return [
        io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01, round=0.001, advanced=True,
            tooltip="Part of the noise schedule from which it acts, 0 to 1. Higher leaves the first steps to the prompt alone."),
        io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, round=0.001, advanced=True,
            tooltip="Part of the noise schedule up to which it acts, 0 to 1. Lower leaves fine detail to the prompt alone, and is faster."),
    ]  # fmt: skip


def rgb(image: torch.Tensor) -> torch.Tensor:
    """image [B, H, W, C] -> [B, H, W, 3]: without alpha, grey three times."""
    return image[..., :3] if image.shape[-1] >= 3 else image[..., :1].expand(*image.shape[:-1], 3)


def encode(model, vae, image: torch.Tensor, what: str) -> torch.Tensor:
    """image [B, H, W, 3 or more] 0..1 -> latent [B, C, (T,) h, w] as the diffusion model sees it, fp32 on the CPU. For a video
    VAE the images are the frames of one clip. ValueError where the VAE is another model's."""
    if vae is None:
        raise ValueError(f"{what} needs a VAE to encode its image with. Connect the one that belongs to this MODEL.")
    return to_model(model, vae.encode(rgb(image)), what)


def to_model(model, latent: torch.Tensor, what: str) -> torch.Tensor:
    """A LATENT's samples [B, C, (T,) h, w] as the diffusion model sees them, fp32 on the CPU."""
    if getattr(latent, "is_nested", False):
        raise ValueError(f"{what} takes one latent, and this one holds several (video and sound). Separate them first.")
    space = model.get_model_object("latent_format")
    wanted, dims = space.latent_channels, space.latent_dimensions + 2
    if latent.ndim == dims + 1 and latent.shape[2] == 1:
        latent = latent[:, :, 0]  # one picture from a video VAE
    elif latent.ndim == dims - 1:
        latent = latent[:, :, None]
    if latent.shape[1] != wanted or latent.ndim != dims:
        raise ValueError(
            f"{what} got a latent {[*latent.shape]}, but this MODEL's latents have {wanted} channels and {dims} dimensions. "
            "Take the VAE that belongs to it."
        )
    if not torch.isfinite(latent).all():
        raise ValueError(f"{what} got a latent {[*latent.shape]} that is not finite. Check the image and the VAE.")
    return space.process_in(latent.float().cpu())


def spread(condition: torch.Tensor, rows: int, streams: int) -> torch.Tensor:
    """condition [b, ...] for a batch [rows, ...] of so many streams: repeated to the pictures of a stream as core repeats
    ControlNet images, then for each stream."""
    pictures = rows // streams
    if condition.shape[0] != pictures:
        condition = condition.repeat(-(-pictures // condition.shape[0]), *[1] * (condition.ndim - 1))[:pictures]
    return condition.repeat(streams, *[1] * (condition.ndim - 1)) if streams > 1 else condition
