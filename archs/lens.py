"""Lens: double-stream blocks, image before text, patches of one latent pixel."""

from ._layout import Arch, Blocks, patched


def grid(_, x):
    return patched(x, (1, 1, 1))


ARCHS = (
    Arch(
        "Lens",
        "lens",
        ("LensTransformer2DModel",),
        (Blocks("transformer_blocks", ("img", "txt"), "double_block", ("joint",)),),
        grid,
        "suffix",
        rope="pos_embed",
        text_after=True,
    ),
)
