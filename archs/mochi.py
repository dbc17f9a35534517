"""Mochi: joint blocks, video before text."""

from torch.nn.functional import rms_norm, silu

from ._layout import Arch, Blocks, patched, square
from ._modulate import under


def grid(model, x):
    """Patches of 2 in space."""
    return patched(x, square(model.patch_size))


def modulated(model, arguments):
    """The video [B, N, D] after the first block's RMS norm and scale."""
    x = arguments["img"]
    scale = model.blocks[0].mod_x(silu(arguments["vec"])).chunk(4, 1)[0]
    return under(rms_norm(x, (x.shape[-1],), eps=1e-6), scale.unsqueeze(1))


def rescaled(model, grid):
    return "Mochi 1", (-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719)


ARCHS = (
    Arch(
        "Mochi",
        "genmo",
        ("AsymmDiTJoint",),
        (Blocks("blocks", ("img", "txt"), "double_block", ("joint",)),),
        grid,
        "suffix",
        wrapper=False,
        indexed=False,
        modulated=modulated,
        rescaled=rescaled,
        mlps={"blocks": ("mlp_x", "mlp_y")},
    ),
)
