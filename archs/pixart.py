"""PixArt alpha and sigma: image tokens alone in self-attention, text in cross-attention."""

from ._layout import Arch, Blocks, patched, square


def grid(model, x):
    """Patches of 2."""
    return patched(x, square(model.patch_size))


ARCHS = (
    Arch(
        "PixArt",
        "pixart",
        ("PixArtMS",),
        (Blocks("blocks", ("x",), calls=("self", "cross"), positions=(0,), attention="attn"),),
        grid,
        override=False,
        wrapper=False,
        indexed=False,
        mlps={"blocks": ("mlp",)},
    ),
)
