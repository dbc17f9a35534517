"""ERNIE-Image: single-stream blocks, image before text, one latent pixel a token."""

from ._layout import Arch, Blocks, patched, square


def grid(model, x):
    return patched(x, square(model.patch_size))


ARCHS = (
    Arch(
        "ERNIE-Image",
        "ernie",
        ("ErnieImageModel",),
        (Blocks("layers", ("x",), calls=("joint",), positions=(0,), joined=True, attention="self_attention"),),
        grid,
        "suffix",
        override=False,
        wrapper=False,
        indexed=False,
    ),
)
