"""Flux, Flux 2, Chroma and Chroma Radiance: double blocks with text beside the image, then single blocks over both."""

from ._layout import Arch, Blocks, patched, square
from ._modulate import double_block

DOUBLE = Blocks("double_blocks", ("img", "txt"), "double_block", ("joint",), mutates=True)
SINGLE = Blocks("single_blocks", ("img",), "single_block", ("joint",), mutates=True, joined=True)


def grid(model, x):
    """Patches of 2 (Flux, Chroma), 1 (Flux 2) or 16 pixels (Radiance)."""
    return patched(x, square(model.patch_size))


def rescaled(model, grid):
    """Flux 1; Flux 2 modulates all its blocks alike and has no published polynomial."""
    if model.params.global_modulation:
        return None
    return "FLUX.1", (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)


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
        modulated=double_block,
        rescaled=rescaled,
        notes="Reference latents follow the image; transformer_options counts them in reference_image_num_tokens.",
    ),
    Arch(
        "Chroma",
        "chroma",
        ("Chroma",),
        (DOUBLE, SINGLE),
        grid,
        "prefix",
        rope="pe_embedder",
        rotates=True,
        modulated=double_block,
    ),
    Arch(
        "Chroma Radiance",
        "chroma_radiance",
        ("ChromaRadiance",),
        (DOUBLE, SINGLE),
        grid,
        "prefix",
        rope="pe_embedder",
        rotates=True,
        modulated=double_block,
    ),
)
