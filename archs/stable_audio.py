"""Stable Audio: a row of audio tokens behind memory and conditioning tokens."""

from ._layout import Arch, Blocks, video


def grid(model, x):
    """Latent [B, C, L] in patches along L."""
    return (1, 1, -(-video(x).shape[-1] // model.patch_size))


ARCHS = (
    Arch(
        "Stable Audio",
        "audio",
        ("AudioDiffusionTransformer",),
        (Blocks("transformer.layers", ("img",), "double_block", ("joint", "cross"), joined=True),),
        grid,
        "prefix",
        wrapper=False,
        indexed=False,
        limits={"attention": "Stable Audio asks for exact attention in every call."},
    ),
)
