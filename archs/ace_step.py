"""ACE-Step 1 and 1.5: music as a row of audio tokens."""

from ._layout import Arch, Blocks, video


def grid(model, x):
    """Latent [B, 8, 16, L] (version 1) or [B, C, L] (1.5): patches along L only."""
    decoder = getattr(model, "decoder", None)
    return (1, 1, -(-video(x).shape[-1] // (decoder.patch_size if decoder is not None else 1)))


ARCHS = (
    Arch(
        "ACE-Step",
        "ace",
        ("ACEStepTransformer2DModel",),
        (Blocks("transformer_blocks", ("hidden_states",), calls=("cross",), positions=(0,)),),
        grid,
        indexed=False,
        limits={"attention": "ACE-Step's self-attention is linear already."},
    ),
    Arch(
        "ACE-Step 1.5",
        "ace",
        ("AceStepConditionGenerationModel",),
        (Blocks("decoder.layers", ("hidden_states",), calls=("self", "cross"), positions=(0,)),),
        grid,
        override=False,
        wrapper=False,
        indexed=False,
        limits={"attention": "ACE-Step 1.5 does not pass ComfyUI's attention override on."},
    ),
)
