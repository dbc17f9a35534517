"""HiDream-I1 and -E1 (image before text, other text in every block) and HiDream-O1 (a language model over pixels)."""

from ._layout import Arch, Blocks, patched, square


def grid(model, x):
    """Patches of 2 latent pixels, or of 32 pixels (O1)."""
    return patched(x, square(model.patch_size))


ARCHS = (
    Arch(
        "HiDream-I1",
        "hidream",
        ("HiDreamImageTransformer2DModel",),
        (
            Blocks("double_stream_blocks", ("image_tokens", "text_tokens"), calls=("joint",), positions=(0, 2)),
            Blocks("single_stream_blocks", ("image_tokens",), calls=("joint",), positions=(0,), joined=True),
        ),
        grid,
        "suffix",
        indexed=False,
        opaque=("image_cond",),  # E1 lays the source image beside the latent, which widens every row
        notes="Before each block its own text tokens are appended; after it they are dropped.",
    ),
    Arch(
        "HiDream-O1",
        "hidream_o1",
        ("HiDreamO1Transformer",),
        (Blocks("language_model.layers", ("x",), "double_block", ("other",), joined=True),),
        grid,
        "prefix",
        notes="Any replace hook switches off the model's own cache of the text's keys and values.",
        limits={"attention": "HiDream-O1 splits its queries into causal text and image, which no method here handles."},
    ),
)
