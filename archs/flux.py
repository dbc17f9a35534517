"""Flux, Flux 2, Chroma and Chroma Radiance: double blocks with text beside the image, then single blocks over both."""

from ._layout import Arch, Blocks, patched, square

DOUBLE = Blocks("double_blocks", ("img", "txt"), "double_block", ("joint",), mutates=True)
SINGLE = Blocks("single_blocks", ("img",), "single_block", ("joint",), mutates=True, joined=True)


def grid(model, x):
    """Patches of 2 (Flux, Chroma), 1 (Flux 2) or 16 pixels (Radiance)."""
    return patched(x, square(model.patch_size))


ARCHS = (
    Arch(
        "Flux",
        "flux",
        ("Flux",),
        (DOUBLE, SINGLE),
        grid,
        "prefix",
        rope="pe_embedder",
        rope_options=True,
        rotates=True,
        notes="Reference latents follow the image; transformer_options counts them in reference_image_num_tokens.",
    ),
    Arch("Chroma", "chroma", ("Chroma",), (DOUBLE, SINGLE), grid, "prefix", rope="pe_embedder", rotates=True),
    Arch(
        "Chroma Radiance",
        "chroma_radiance",
        ("ChromaRadiance",),
        (DOUBLE, SINGLE),
        grid,
        "prefix",
        rope="pe_embedder",
        rotates=True,
    ),
)
