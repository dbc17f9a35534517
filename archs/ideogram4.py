"""Ideogram 4: single-stream blocks, text before image (image alone without a prompt), one latent pixel a token."""

from ._layout import Arch, Blocks, patched


def grid(_, x):
    return patched(x, (1, 1, 1))


ARCHS = (
    Arch(
        "Ideogram 4",
        "ideogram4",
        ("Ideogram4Transformer2DModel",),
        (Blocks("layers", ("x",), calls=("joint",), positions=(0,), joined=True),),
        grid,
        "prefix",
        indexed=False,
    ),
)
