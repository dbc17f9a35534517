"""Krea 2: single-stream blocks, text before image; frames are folded into the batch. Reference latents follow."""

from ._layout import Arch, Blocks, patched, square, video


def grid(model, x):
    """Patches of 2; one frame, whatever the latent's length."""
    return (1, *patched(video(x), square(model.patch))[1:])


ARCHS = (
    Arch(
        "Krea 2",
        "krea2",
        ("SingleStreamDiT",),
        (Blocks("blocks", ("x",), calls=("joint",), positions=(0,), joined=True),),
        grid,
        "prefix",
        rope="pe_embedder",
    ),
)
