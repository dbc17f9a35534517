"""JoyImage: double-stream blocks, image before text; reference latents stand between the two."""

from ._layout import Arch, Blocks, patched


def grid(model, x):
    """Patches (1, 2, 2)."""
    return patched(x, model.patch_size)


ARCHS = (
    Arch(
        "JoyImage",
        "joyimage",
        ("JoyImageTransformer3DModel",),
        (Blocks("double_blocks", ("img", "txt"), "double_block", ("joint",)),),
        grid,
        "suffix",
    ),
)
