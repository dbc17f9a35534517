"""Qwen-Image and Mage-Flow: double-stream blocks only. Reference latents follow the image."""

from ._layout import Arch, Blocks, patched, square
from ._modulate import under

STACK = (Blocks("transformer_blocks", ("img", "txt"), "double_block", ("joint",)),)


def grid(model, x):
    """Patches of 2 (Qwen-Image) or 1 (Mage-Flow)."""
    return patched(x, square(model.patch_size))


def modulated(model, arguments):
    """The image [B, N, D] after the first block's norm, scale and shift. References may have a timestep of their own: its
    rows come after the image's."""
    block, x = model.transformer_blocks[0], arguments["img"]
    shift, scale = block.img_mod(arguments["vec"])[: x.shape[0], None].split(x.shape[-1], -1)[:2]
    return under(block.img_norm1(x), scale, shift)


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
        modulated=modulated,
    ),
    Arch("Mage-Flow", "mage_flow", ("MageFlowTransformer2DModel",), STACK, grid, "prefix", rope="pe_embedder"),
)
