"""HunyuanVideo 1 and 1.5, HunyuanImage: Flux-like stacks over video tokens."""

from ._layout import Arch, patched
from ._modulate import double_block
from .flux import DOUBLE, SINGLE


def grid(model, x):
    """Patches as listed in patch_size, (t, h, w) or, for images, (h, w)."""
    return patched(x, (1, *model.patch_size)[-3:])


def rescaled(model, grid):
    """The first HunyuanVideo; later ones and the image models have no published polynomial."""
    if len(model.patch_size) != 3 or model.params.byt5 or model.params.use_cond_type_embedding:
        return None
    return "HunyuanVideo", (733.226126, -401.131952, 67.5869174, -3.14987800, 0.0961237896)


ARCHS = (
    Arch(
        "HunyuanVideo",
        "hunyuan_video",
        ("HunyuanVideo",),
        (DOUBLE, SINGLE),
        grid,
        "prefix",
        rope="pe_embedder",
        modulated=double_block,
        rescaled=rescaled,
        mlps={"double_blocks": ("img_mlp", "txt_mlp")},
        notes="A reference latent sits between text and video, in front of the image tokens.",
    ),
)
