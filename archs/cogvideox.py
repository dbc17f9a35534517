"""CogVideoX: joint blocks, text before video."""

from ._layout import Arch, Blocks, patched


def grid(model, x):
    """Patches of 2 in space; version 1.5 also joins frames."""
    return patched(x, (model.patch_size_t or 1, model.patch_size, model.patch_size))


ARCHS = (
    Arch(
        "CogVideoX",
        "cogvideo",
        ("CogVideoXTransformer3DModel",),
        (Blocks("blocks", ("hidden_states", "encoder_hidden_states"), calls=("joint",), positions=(0, 1)),),
        grid,
        "prefix",
        indexed=False,
    ),
)
