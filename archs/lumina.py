"""Lumina 2 and Z-Image: single-stream blocks over caption and image, after a refiner for each.

Z-Image pads caption and image to multiples of 32 tokens, each at its end. Reference images and their captions stand
before the image."""

from ._layout import Arch, Blocks, patched, square


def grid(model, x):
    """Patches of 2, or of 32 pixels in the pixel-space variant."""
    return patched(x, square(model.patch_size))


def pad(model):
    return model.pad_tokens_multiple or 1


ARCHS = (
    Arch(
        "Lumina 2",
        "lumina",
        ("NextDiT", "NextDiTPixelSpace"),
        (
            Blocks("noise_refiner", ("x",), positions=(0,), stack=False),
            Blocks("layers", ("x",), calls=("joint",), positions=(0,), joined=True),
        ),
        grid,
        "prefix",
        pad=pad,
        rope="rope_embedder",
        rope_options=True,
    ),
)
