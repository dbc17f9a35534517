"""Hunyuan3D 2.0 and 2.1: sets of shape tokens without a grid."""

from ._layout import Arch, Blocks, video


def grid(_, x):
    """Latent [B, C, N]: N tokens in no particular order."""
    return (1, 1, video(x).shape[-1])


ARCHS = (
    Arch(
        "Hunyuan3D 2",
        "hunyuan3d",
        ("Hunyuan3Dv2",),
        (
            Blocks("double_blocks", ("img", "txt"), "double_block", ("joint",), mutates=True),
            Blocks("single_blocks", ("img",), "single_block", ("joint",), mutates=True, joined=True),
        ),
        grid,
        "prefix",
        indexed=False,
        unordered=True,
    ),
    Arch(
        "Hunyuan3D 2.1",
        "hunyuan3dv2_1",
        ("HunYuanDiTPlain",),
        (Blocks("blocks", ("hidden_states",), calls=("joint", "cross"), positions=(0,), joined=True),),
        grid,
        "prefix",
        override=False,
        wrapper=False,
        indexed=False,
        notes="A timestep token leads the sequence. Its replace hook returns a tensor, not a dict.",
        limits={"attention": "Hunyuan3D 2.1 does not pass ComfyUI's attention override on."},
    ),
)
