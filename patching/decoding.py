"""How a node that judges latents turns them into pictures."""

from collections.abc import Callable
from typing import Any

import torch

from ..methods.digits import codec


def decoder(name: str, decode: str, vae: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """latent samples -> images [N, H, W, C] in 0..1 for decode vae or digits, None for none. ValueError where the VAE is
    missing; name: of the node."""
    if decode == "vae" and vae is None:
        raise ValueError(f"{name}: decode is vae but no VAE is connected. Connect one, or choose another decode.")
    return {"vae": lambda samples: _frames(vae.decode(samples)), "digits": _digits, "none": None}[decode]


def _frames(images: torch.Tensor) -> torch.Tensor:
    return images.reshape(-1, *images.shape[-3:])


def _digits(samples: torch.Tensor) -> torch.Tensor:
    pixels = codec.decode(samples)
    return pixels.reshape(-1, *pixels.shape[-2:], 1).expand(-1, -1, -1, 3)
