"""LTX-Video and LTX-2 (video with audio): video tokens alone in self-attention, patches of one latent pixel."""

from ._layout import Arch, Blocks, patched

KEYFRAMES = ("keyframe_idxs",)  # guide frames lie at the end of the video and lose some of their tokens


def grid(_, x):
    return patched(x, (1, 1, 1))


ARCHS = (
    Arch(
        "LTX-Video",
        "lightricks",
        ("LTXVModel",),
        (Blocks("transformer_blocks", ("img",), "double_block", ("self", "cross"), mutates=True),),
        grid,
        indexed=False,
        opaque=KEYFRAMES,
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
        opaque=KEYFRAMES,
        notes="The stream is a tuple (video, audio). After the video's attention: audio onto itself, audio onto text, "
        "video onto audio, audio onto video.",
    ),
)
