"""HunyuanVideo 1 and 1.5, HunyuanImage: Flux-like stacks over video tokens."""

from ._layout import Arch, Blocks, patched


def grid(model, x):
    """Patches as listed in patch_size, (t, h, w) or, for images, (h, w)."""
    return patched(x, (1, *model.patch_size)[-3:])


ARCHS = (
    Arch(
        "HunyuanVideo",
        "hunyuan_video",
        ("HunyuanVideo",),
        (
            Blocks("double_blocks", ("img", "txt"), "double_block", ("joint",), mutates=True),
            Blocks("single_blocks", ("img",), "single_block", ("joint",), mutates=True, joined=True),
        ),
        grid,
        "prefix",
        rope="pe_embedder",
        notes="A reference latent sits between text and video, in front of the image tokens.",
    ),
)
