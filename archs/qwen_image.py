"""Qwen-Image and Mage-Flow: double-stream blocks only. Reference latents follow the image."""

from dataclasses import replace

import torch

from ._layout import PE, Arch, Blocks, Modules, patched, square
from ._modulate import under


def gated(block, given, outputs):
    """QwenImageTransformerBlock.forward from its outputs: hidden_states [B, N, D] and encoder_hidden_states [B, L, D] ->
    (text, image). Where reference tokens are modulated by timestep 0, temb's second half is theirs."""
    img, txt, temb = given["hidden_states"], given["encoder_hidden_states"], given["temb"]
    border = given["timestep_zero_index"]
    of_img = block.img_mod(temb).chunk(6, dim=-1)
    of_txt = block.txt_mod(temb if border is None else temb.chunk(2, dim=0)[0]).chunk(6, dim=-1)
    img_attention, txt_attention = outputs["attn"]
    img = _onto(img, img_attention, of_img[2], border)
    txt = txt + of_txt[2].unsqueeze(1) * txt_attention
    img = _onto(img, outputs["img_mlp"], of_img[5], border)
    txt = torch.addcmul(txt, of_txt[5].unsqueeze(1), outputs["txt_mlp"])
    return txt, img


def _onto(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, border: int | None) -> torch.Tensor:
    """x + gate y [B, N, D], gate [B, D], or [2B, D] of the tokens before the border and after it."""
    if border is None:
        return torch.addcmul(x, gate.unsqueeze(1), y)
    now, zero = gate.unsqueeze(1).split(gate.shape[0] // 2)
    return x + torch.cat((y[:, :border] * now, y[:, border:] * zero), dim=1)


MODULES = Modules("QwenImageTransformerBlock", ("attn", "img_mlp", "txt_mlp"), gated, sizes=2)
STACK = Blocks("transformer_blocks", ("img", "txt"), "double_block", ("joint",), modules=MODULES)


def grid(model, x):
    """Patches of 2 (Qwen-Image) or 1 (Mage-Flow)."""
    return patched(x, square(model.patch_size))


def modulated(model, arguments):
    """The image [B, N, D] after the first block's norm, scale and shift. References may have a timestep of their own: its
    rows come after the image's."""
    block, x = model.transformer_blocks[0], arguments["img"]
    shift, scale = block.img_mod(arguments["vec"])[: x.shape[0], None].split(x.shape[-1], -1)[:2]
    return under(block.img_norm1(x), scale, shift)


ARCHS = (
    Arch(
        "Qwen-Image",
        "qwen_image",
        ("QwenImageTransformer2DModel",),
        (replace(STACK, per_token=PE),),
        grid,
        "prefix",
        rope="pe_embedder",
        text_after=True,
        mlps={"transformer_blocks": ("img_mlp", "txt_mlp")},
        rotates=True,
        modulated=modulated,
    ),
    Arch("Mage-Flow", "mage_flow", ("MageFlowTransformer2DModel",), (STACK,), grid, "prefix", rope="pe_embedder"),
)
