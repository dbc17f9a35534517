"""Lumina 2 and Z-Image: single-stream blocks over caption and image, after a refiner for each.

Z-Image pads caption and image to multiples of 32 tokens, each at its end. Reference images and their captions stand
before the image."""

from ._layout import Arch, Blocks, patched, square
from ._modulate import under


def grid(model, x):
    """Patches of 2, or of 32 pixels in the pixel-space variant."""
    return patched(x, square(model.patch_size))


def pad(model):
    return model.pad_tokens_multiple or 1


def modulated(model, arguments):
    """Caption and image [B, N, D] after the first layer's norm and scale."""
    layer = model.layers[0]
    scale = layer.adaLN_modulation(arguments["adaln_input"]).chunk(4, 1)[0]
    return under(layer.attention_norm1(arguments["x"]), scale.unsqueeze(1))


def rescaled(model, grid):
    """Z-Image takes its modulation from the timestep in another way: one linear layer without SiLU."""
    if len(model.layers[0].adaLN_modulation) == 1:
        return None
    return "Lumina 2", (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344)


ARCHS = (
    Arch(
        "Lumina 2",
        "lumina",
        ("NextDiT", "NextDiTPixelSpace"),
        (
            Blocks("noise_refiner", ("x",), positions=(0,), stack=False),
            Blocks("layers", ("x",), calls=("joint",), positions=(0,), joined=True, per_token={"freqs_cis": (1, 6)}),
        ),
        grid,
        "prefix",
        pad=pad,
        mlps={"layers": ("feed_forward",)},
        rope="rope_embedder",
        rope_options=True,
        modulated=modulated,
        rescaled=rescaled,
    ),
)
