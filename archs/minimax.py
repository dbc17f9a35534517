"""MiniMax H3 (video with audio): text, conditions, audio and at last the video, packed in one sequence of batch 1."""

from ._layout import Arch, Blocks, patched


def grid(model, x):
    """Patches (1, 2, 2) of the video."""
    return patched(x, model.patch_size)


ARCHS = (
    Arch(
        "MiniMax H3",
        "minimax",
        ("MiniMaxH3Model",),
        (Blocks("blocks", ("img",), "double_block", ("joint",), mutates=True, joined=True, axes="ND"),),
        grid,
        "prefix",
        indexed=False,
    ),
)
