"""CogVideoX: joint blocks, text before video."""

from ._layout import Arch, Blocks, patched


def grid(model, x):
    """Patches of 2 in space; version 1.5 also joins frames."""
    return patched(x, (model.patch_size_t or 1, model.patch_size, model.patch_size))


def modulated(model, arguments):
    """The timestep's embedding [B, D]."""
    return arguments["temb"]


def rescaled(model, grid):
    """2B and 5B and 1.5, from text alone: image to video has twice the input channels and other polynomials."""
    weight = model.patch_embed.proj.weight  # [D, C, p, p], or [D, C p p t] where frames are joined
    cells = model.patch_size**2 * (model.patch_size_t or 1)
    if weight[0].numel() // cells > 16:
        return None
    if model.patch_size_t:
        return "CogVideoX 1.5 5B", (250.210439, -165.061612, 35.7804877, -0.781551492, 0.0358559703)
    if len(model.blocks) > 30:
        return "CogVideoX 5B", (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339)
    return "CogVideoX 2B", (-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434)


ARCHS = (
    Arch(
        "CogVideoX",
        "cogvideo",
        ("CogVideoXTransformer3DModel",),
        (Blocks("blocks", ("hidden_states", "encoder_hidden_states"), calls=("joint",), positions=(0, 1)),),
        grid,
        "prefix",
        indexed=False,
        modulated=modulated,
        rescaled=rescaled,
    ),
)
