"""From what a user connects to a condition on the MODEL."""

import comfy.utils
import torch

from ..methods.control.easycontrol import EasyControlWeights
from .control import encode, rgb, to_model
from .easycontrol import NAME, EasyControlFeature
from .run import attach
from .widgets import percents

MODES = ("auto", "spatial", "subject")
GREY = 0.5


def prepared(image: torch.Tensor, subject: bool, side: int) -> torch.Tensor:
    """image [B, H, W, C] -> [B, side, side, 3]. A layout is stretched to the square, its token positions are stretched
    back; a subject keeps its proportions between grey edges (sections 3.3 and 4 of the paper, and its code)."""
    pixels = rgb(image).movedim(-1, 1)
    if not subject:
        return comfy.utils.common_upscale(pixels, side, side, "lanczos", "disabled").movedim(1, -1)
    height, width = pixels.shape[-2:]
    scale = side / max(height, width)
    fitted = max(1, round(height * scale)), max(1, round(width * scale))
    out = pixels.new_full((pixels.shape[0], 3, side, side), GREY)
    top, left = (side - fitted[0]) // 2, (side - fitted[1]) // 2
    out[:, :, top : top + fitted[0], left : left + fitted[1]] = comfy.utils.common_upscale(
        pixels, fitted[1], fitted[0], "lanczos", "disabled"
    )
    return out.movedim(1, -1)


def is_subject(mode: str, weights: EasyControlWeights) -> bool:
    """What "auto" means: what the file says of itself, or its name; else a layout."""
    return mode == "subject" or (mode == "auto" and bool(weights.subject))


def apply(model, node, weights, image, vae, latent, mode, cond_size, strength, lora_scale, start, end, cache, dtype):
    """A clone of the MODEL with one condition more."""
    subject = is_subject(mode, weights)
    if (image is None) == (latent is None):
        given = "both" if image is not None else "neither"
        raise ValueError(
            f"{NAME} takes its condition from an image or from a latent, and {given} is connected. Connect one."
        )
    if image is not None:
        condition = encode(model, vae, prepared(image, subject, cond_size), NAME)
    else:
        condition = to_model(model, latent["samples"], NAME)
    feature = EasyControlFeature(
        node,
        NAME,
        strength=strength,
        percents=percents(start, end),
        weights=weights,
        latent=condition,
        subject=subject,
        lora_scale=lora_scale,
        cache=cache,
        kv_dtype=dtype,
    )
    return attach(model, feature)
