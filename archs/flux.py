"""Flux, Flux 2, Chroma and Chroma Radiance: double blocks with text beside the image, then single blocks over both."""

import torch

from ._layout import PE, Arch, Blocks, Modules, patched, square
from ._modulate import double_block


def gated(y: torch.Tensor, gate: torch.Tensor, places) -> torch.Tensor:
    """y [B, N, D] under its gate [B, 1 or more, D]. places: (start, end, row of the gate) where parts of the tokens are
    modulated by another timestep; then y itself is written to."""
    if places is None:
        return y * gate
    for start, end, row in places:
        y[:, start:end] *= gate[:, row : row + 1]
    return y


def finite(x: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504) if x.dtype == torch.float16 else x


def double(block, given, outputs):
    """DoubleStreamBlock.forward from its four outputs: img [B, N, D], txt [B, L, D] -> the same."""
    img, txt, vec = given["img"], given["txt"], given["vec"]
    of_img, of_txt = (block.img_mod(vec), block.txt_mod(vec)) if block.modulation else vec
    for module, mod in (("img_attn.proj", of_img[0]), ("img_mlp", of_img[1])):
        img += gated(outputs[module], mod.gate, given["modulation_dims_img"])
    for module, mod in (("txt_attn.proj", of_txt[0]), ("txt_mlp", of_txt[1])):
        txt += gated(outputs[module], mod.gate, given["modulation_dims_txt"])
    return img, finite(txt)


def single(block, given, outputs):
    """SingleStreamBlock.forward from linear2's output: x [B, L + N, D] -> the same."""
    x, mod = given["x"], block.modulation(given["vec"])[0] if block.modulation else given["vec"]
    x += gated(outputs["linear2"], mod.gate, given["modulation_dims"])
    return finite(x)


OF_DOUBLE = Modules("DoubleStreamBlock", ("img_attn.proj", "img_mlp", "txt_attn.proj", "txt_mlp"), double, sizes=2)
OF_SINGLE = Modules("SingleStreamBlock", ("linear2",), single, sizes=1)
DOUBLE = Blocks(
    "double_blocks", ("img", "txt"), "double_block", ("joint",), mutates=True, modules=OF_DOUBLE, per_token=PE
)
SINGLE = Blocks(
    "single_blocks", ("img",), "single_block", ("joint",), mutates=True, joined=True, modules=OF_SINGLE, per_token=PE
)

MLPS = {"double_blocks": ("img_mlp", "txt_mlp")}  # a single block's MLP is fused with its projections


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
        post_input=True,
        rotates=True,
        modulated=double_block,
        mlps=MLPS,
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
        mlps=MLPS,
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
        mlps=MLPS,
    ),
)
