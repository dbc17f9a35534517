"""HunyuanDiT: image tokens alone in self-attention; the second half of the blocks takes long skips from the first."""

from ._layout import Arch, Blocks, patched, square


def grid(model, x):
    """Patches of 2."""
    return patched(x, square(model.patch_size))


ARCHS = (
    Arch(
        "HunyuanDiT",
        "hydit",
        ("HunYuanDiT",),
        (Blocks("blocks", ("img",), "double_block", ("self", "cross"), attention="attn1"),),
        grid,
        override=False,
        wrapper=False,
        indexed=False,
        mlps={"blocks": ("mlp",)},
    ),
)
