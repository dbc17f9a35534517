"""SANA-Video: video tokens alone in linear self-attention, text in cross-attention; its feed-forward mixes neighbours."""

from ._layout import Arch, Blocks, Modules, patched
from ._modulate import under


def grid(model, x):
    """Patches of the sizes that the network was made for."""
    return patched(x, model.sizes.patch)


def spread(x, gate):
    """x [B, N, D] times gate [B, M, D], M = 1, frames or N."""
    return (x.unflatten(1, (gate.shape[1], -1)) * gate[:, :, None]).flatten(1, 2)


def gated(block, given, outputs):
    """SanaVideoBlock.forward from its three outputs: img [B, N, D] -> the same."""
    gates = block.modulation(given["vec"])
    img = given["img"] + spread(outputs["attn1"], gates[2])
    return img + outputs["attn2"] + spread(outputs["ff"], gates[5])


def modulated(model, arguments):
    """The first block's image input under its modulation."""
    block = model.transformer_blocks[0]
    shift, scale, *_ = block.modulation(arguments["vec"])
    return under(block.norm1(arguments["img"]), scale, shift)


ARCHS = (
    Arch(
        "SANA-Video",
        "networks",
        ("SanaVideo",),
        (
            Blocks(
                "transformer_blocks",
                ("img",),
                "double_block",
                ("cross",),
                modules=Modules("SanaVideoBlock", ("attn1", "attn2", "ff"), gated, sizes=3),
            ),
        ),
        grid,
        rope_options=True,
        modulated=modulated,
        limits={"attention": "its self-attention is linear, so there are no query-key pairs to choose from."},
    ),
)
