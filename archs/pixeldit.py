"""PixelDiT and PiD: joint blocks over patches of 16 pixels, then pixel blocks that attend between patches."""

from ._layout import Arch, Blocks, patched, square


def grid(model, x):
    """Patches of 16 pixels."""
    return patched(x, square(model.patch_size))


ARCHS = (
    Arch(
        "PixelDiT",
        "pixeldit",
        ("PixDiT_T2I", "PidNet"),
        (
            Blocks("patch_blocks", ("x", "y"), calls=("joint",), positions=(0, 1)),
            Blocks("pixel_blocks", ("x",), positions=(0,), axes="NPD", stack=False),
        ),
        grid,
        "prefix",
        indexed=False,
        notes="Pixel blocks keep each patch's pixels: [batch times patches, pixels, dim].",
    ),
)
