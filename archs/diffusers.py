"""Transformer classes of diffusers that Load Diffusers Model bridges (home "diffusers", not a package of ComfyUI). Sizes
come from the model's own config; blocks hand residual streams on under the names "img" and "txt"."""

from ._layout import Arch, Blocks, patched, square

HOME = "diffusers"
LINEAR = "its self-attention is linear, so there are no query-key pairs to choose from."
ALTERNATE = "the spatial and temporal blocks of Latte alternate."


def images(model, x):
    """Patches of one frame, patch_size x patch_size."""
    return patched(x, square(model.config.patch_size))


def volumes(model, x):
    """Patches (t, h, w)."""
    return patched(x, model.config.patch_size)


def packed(_, x):
    """Flux packs 2 x 2 latent pixels into a token, whatever its patch_size says."""
    return patched(x, square(2))


def pixels(model, x):
    """LTX-Video: latent pixels, unless the config joins some."""
    config = model.config
    return patched(x, (config.patch_size_t, config.patch_size, config.patch_size))


def joined_frames(model, x):
    """CogVideoX: patches of one frame; version 1.5 also joins frames."""
    config = model.config
    return patched(x, (config.patch_size_t or 1, config.patch_size, config.patch_size))


def frame(model, x):
    """Latte: a frame at a time, frames are rows of the batch."""
    return (1, *patched(x, square(model.config.patch_size))[1:])


def alone(*calls, per_token=None):
    """Blocks with the image tokens as their only stream."""
    return Blocks("transformer_blocks", ("img",), "double_block", calls, per_token=per_token)


def both(*calls, path="transformer_blocks", replace="double_block", per_token=None):
    """Blocks with image and text as streams apart."""
    return Blocks(path, ("img", "txt"), replace, calls, per_token=per_token)


IMAGE_MLP = {"transformer_blocks": ("ff",)}
BOTH_MLPS = {"transformer_blocks": ("ff", "ff_context")}  # in Flux, a single block's MLP is fused with its projections
NOTHING: dict[str, tuple[int, int]] = {}  # no rotations, one time step: nothing beside the streams belongs to a token


ARCHS = (
    Arch(
        "DiT (diffusers)", HOME, ("DiTTransformer2DModel",), (alone("self", per_token=NOTHING),), images, mlps=IMAGE_MLP
    ),
    Arch(
        "PixArt (diffusers)",
        HOME,
        ("PixArtTransformer2DModel",),
        (alone("self", "cross", per_token=NOTHING),),
        images,
        mlps=IMAGE_MLP,
    ),
    Arch(
        "Sana (diffusers)", HOME, ("SanaTransformer2DModel",), (alone("cross"),), images, limits={"attention": LINEAR}
    ),
    Arch(
        "Sana Video (diffusers)",
        HOME,
        ("SanaVideoTransformer3DModel",),
        (alone("cross"),),
        volumes,
        limits={"attention": LINEAR},
    ),
    Arch("CogVideoX (diffusers)", HOME, ("CogVideoXTransformer3DModel",), (both("joint"),), joined_frames, "prefix"),
    Arch(
        "Latte (diffusers)",
        HOME,
        ("LatteTransformer3DModel",),
        (
            alone("self", "cross"),
            Blocks("temporal_transformer_blocks", ("img",), "temporal_block", ("other",), stack=False),
        ),
        frame,
        limits={"blocks": ALTERNATE},
        notes="Served where it attends within a frame; attention between frames is over 16 tokens at most.",
    ),
    Arch(
        "LTX-Video (diffusers)",
        HOME,
        ("LTXVideoTransformer3DModel",),
        (alone("self", "cross"),),
        pixels,
        mlps=IMAGE_MLP,
    ),
    Arch(
        "Flux (diffusers)",
        HOME,
        ("FluxTransformer2DModel",),
        (both("joint"), both("joint", path="single_transformer_blocks", replace="single_block")),
        packed,
        "prefix",
        mlps=BOTH_MLPS,
    ),
    Arch(
        "Stable Diffusion 3 (diffusers)",
        HOME,
        ("SD3Transformer2DModel",),
        (both("joint", "self", per_token=NOTHING),),
        images,
        "suffix",
        mlps=BOTH_MLPS,
        notes="The last block returns no text.",
    ),
    Arch(
        "Wan (diffusers)",
        HOME,
        ("WanTransformer3DModel",),
        (Blocks("blocks", ("img",), "double_block", ("self", "cross")),),
        volumes,
        mlps={"blocks": ("ffn",)},
    ),
)
