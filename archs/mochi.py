"""Mochi: joint blocks, video before text."""

from ._layout import Arch, Blocks, patched, square


def grid(model, x):
    """Patches of 2 in space."""
    return patched(x, square(model.patch_size))


ARCHS = (
    Arch(
        "Mochi",
        "genmo",
        ("AsymmDiTJoint",),
        (Blocks("blocks", ("img", "txt"), "double_block", ("joint",)),),
        grid,
        "suffix",
        wrapper=False,
        indexed=False,
    ),
)
