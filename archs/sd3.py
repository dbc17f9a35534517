"""Stable Diffusion 3 and 3.5: joint blocks; some blocks of 3.5 Medium attend to the image alone a second time."""

from ._layout import Arch, Blocks, patched, square


def grid(model, x):
    """Patches of 2 in the released models."""
    return patched(x, square(model.patch_size))


ARCHS = (
    Arch(
        "Stable Diffusion 3",
        "modules.diffusionmodules.mmdit",
        ("OpenAISignatureMMDITWrapper",),
        (Blocks("joint_blocks", ("img", "txt"), "double_block", ("joint", "self")),),
        grid,
        "prefix",
        wrapper=False,
        indexed=False,
        notes="The last block returns no text.",
    ),
)
