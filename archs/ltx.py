"""LTX-Video and LTX-2 (video with audio): video tokens alone in self-attention, patches of one latent pixel."""

from torch.nn.functional import rms_norm

from ._layout import Arch, Blocks, patched
from ._modulate import under

KEYFRAMES = ("keyframe_idxs",)  # guide frames lie at the end of the video and lose some of their tokens


def grid(_, x):
    return patched(x, (1, 1, 1))


def modulated(model, arguments):
    """RMS norm, then scale and shift of the first block's table and the timestep [B, 1 or N, 6 D or more]."""
    x, timestep, table = arguments["img"], arguments["vec"], model.transformer_blocks[0].scale_shift_table
    rows = table.to(x.device, x.dtype) + timestep.reshape(x.shape[0], timestep.shape[1], table.shape[0], -1)
    return under(rms_norm(x, (x.shape[-1],), eps=1e-6), rows[:, :, 1], rows[:, :, 0])


def rescaled(model, grid):
    """Models whose cross-attention is modulated too came later."""
    if model.cross_attention_adaln:
        return None
    return "LTX-Video", (21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326)


ARCHS = (
    Arch(
        "LTX-Video",
        "lightricks",
        ("LTXVModel",),
        (Blocks("transformer_blocks", ("img",), "double_block", ("self", "cross"), mutates=True),),
        grid,
        indexed=False,
        mlps={"transformer_blocks": ("ff",)},
        opaque=KEYFRAMES,
        modulated=modulated,
        rescaled=rescaled,
    ),
    Arch(
        "LTX-2",
        "lightricks",
        ("LTXAVModel",),
        (
            Blocks(
                "transformer_blocks",
                ("img",),
                "double_block",
                ("self", "cross", "other", "other", "other", "other"),
                mutates=True,
            ),
        ),
        grid,
        indexed=False,
        mlps={"transformer_blocks": ("ff",)},
        opaque=KEYFRAMES,
        notes="The stream is a tuple (video, audio). After the video's attention: audio onto itself, audio onto text, "
        "video onto audio, audio onto video.",
    ),
)
