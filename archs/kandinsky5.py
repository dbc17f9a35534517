"""Kandinsky 5: video tokens alone in self-attention. Its replace hook raises a TypeError in ComfyUI 0.30."""

from ._layout import Arch, Blocks, patched


def grid(model, x):
    """Patches (1, 2, 2)."""
    return patched(x, model.patch_size)


def scales(model, shape):
    """Of positions; the pro video model, 4096 wide, has others from 14,080 latent places on."""
    pro = model.model_dim == 4096 and shape[-2] * shape[-1] >= 14080
    return tuple(1.0 / factor for factor in ((1.0, 3.16, 3.16) if pro else model.rope_scale_factor))


ARCHS = (
    Arch(
        "Kandinsky 5",
        "kandinsky5",
        ("Kandinsky5",),
        (Blocks("visual_transformer_blocks", ("visual_embed",), calls=("self", "cross"), positions=(0,)),),
        grid,
        shifts_time=scales,
        mlps={"visual_transformer_blocks": ("feed_forward",)},
    ),
)
