"""Stable Diffusion 3 and 3.5: joint blocks; some blocks of 3.5 Medium attend to the image alone a second time."""

from ._layout import Arch, Blocks, patched, square
from ._modulate import under


def grid(model, x):
    """Patches of 2 in the released models."""
    return patched(x, square(model.patch_size))


def modulated(model, arguments):
    """The image [B, N, D] after the first block's norm, scale and shift; a block may have scales alone."""
    block, x = model.joint_blocks[0].x_block, arguments["img"]
    rows = block.adaLN_modulation(arguments["vec"]).unsqueeze(1).split(x.shape[-1], -1)
    return under(block.norm1(x), rows[0]) if block.scale_mod_only else under(block.norm1(x), rows[1], rows[0])


ARCHS = (
    Arch(
        "Stable Diffusion 3",
        "modules.diffusionmodules.mmdit",
        ("OpenAISignatureMMDITWrapper",),
        (Blocks("joint_blocks", ("img", "txt"), "double_block", ("joint", "self"), per_token={}),),
        grid,
        "prefix",
        wrapper=False,
        indexed=False,
        modulated=modulated,
        mlps={"joint_blocks": ("x_block.mlp", "context_block.mlp")},
        notes="The last block returns no text.",
    ),
)
