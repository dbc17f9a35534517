"""Qwen-Image and Mage-Flow: double-stream blocks only. Reference latents follow the image."""

from ._layout import Arch, Blocks, patched, square

STACK = (Blocks("transformer_blocks", ("img", "txt"), "double_block", ("joint",)),)


def grid(model, x):
    """Patches of 2 (Qwen-Image) or 1 (Mage-Flow)."""
    return patched(x, square(model.patch_size))


ARCHS = (
    Arch(
        "Qwen-Image",
        "qwen_image",
        ("QwenImageTransformer2DModel",),
        STACK,
        grid,
        "prefix",
        rope="pe_embedder",
        text_after=True,
        rotates=True,
    ),
    Arch("Mage-Flow", "mage_flow", ("MageFlowTransformer2DModel",), STACK, grid, "prefix", rope="pe_embedder"),
)
