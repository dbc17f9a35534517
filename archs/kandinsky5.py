"""Kandinsky 5: video tokens alone in self-attention. Its replace hook raises a TypeError in ComfyUI 0.30."""

from ._layout import Arch, Blocks, patched


def grid(model, x):
    """Patches (1, 2, 2)."""
    return patched(x, model.patch_size)


ARCHS = (
    Arch(
        "Kandinsky 5",
        "kandinsky5",
        ("Kandinsky5",),
        (Blocks("visual_transformer_blocks", ("visual_embed",), calls=("self", "cross"), positions=(0,)),),
        grid,
        mlps={"visual_transformer_blocks": ("feed_forward",)},
    ),
)
