from comfy_api.latest import io

from ...methods.attention.diagonal import OFFSETS, ORDERS, TEXT, Diagonal
from ...patching.attention import AttentionFeature
from ...patching.run import attach
from ...patching.widgets import where, where_inputs


class DiagonalAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraDiagonalAttention",
            display_name="Diagonal Attention",
            category="Tessera/attention",
            description="In the first blocks of the model, image tokens attend inside small groups of neighbours, and to "
            "the text; the later blocks look at everything. Works with stock weights; a group as large as the picture "
            "changes nothing.",
            search_aliases=["TransNormer", "DiagAttention", "The Devil in Linear Transformer", "block diagonal",
                            "block attention", "local attention", "sparse attention"],
            inputs=[
                io.Model.Input("model", tooltip="A Diffusion Transformer whose token layout is known."),
                io.Int.Input("block", default=256, min=16, max=65536,
                    tooltip="Tokens in a group (16 x 16 pixels each on FLUX, Wan and SD3): 256 is 16 x 16 neighbours. Higher is closer to the plain picture and slower."),
                io.Float.Input("depth", default=0.5, min=0.0, max=1.0, step=0.05, round=0.001,
                    tooltip="Part of the stack of blocks, from its start, that it acts on, 0 to 1. Higher is faster; the last blocks hold the picture together."),
                io.Combo.Input("order", options=list(ORDERS),
                    tooltip="What a group is: neighbours within a frame (tile2d), within the clip (tile3d), or tokens that follow each other row by row (none, as in the paper)."),
                io.Combo.Input("offset", options=list(OFFSETS), advanced=True,
                    tooltip="alternate_half cuts half a group further in every other block, so that seams do not stay in one place. Nothing wraps around."),
                io.Combo.Input("text", options=list(TEXT), advanced=True,
                    tooltip="Where text stands in the same sequence (FLUX, SD3): dense lets every group see it, and the text see every group; "
                            "none cuts both in these blocks, which is faster and follows the prompt less."),
                *where_inputs(),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with diagonal blocks. Connect it to the sampler or the next node.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, block, depth, order, offset, text, **shared):
        feature = AttentionFeature(
            cls.hidden.unique_id,
            "Diagonal Attention",
            method=Diagonal(block, depth, order, offset, text),
            **where(**shared),
        )
        return io.NodeOutput(attach(model, feature))
