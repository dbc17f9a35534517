from comfy_api.latest import io

from ...methods.attention.tile import LAYOUTS, Tile
from ...patching.attention import AttentionFeature
from ...patching.run import attach
from ...patching.widgets import where, where_inputs


class AttentionTile(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraAttentionTile",
            display_name="Attention Tile",
            category="Tessera/attention",
            description="Video: a frame attends to itself, to a few reference frames and to the text, instead of to every "
            "frame; reference frames see everything. Cost grows with the number of frames, not with its square. Works "
            "with stock weights.",
            search_aliases=["Efficient-vDiT", "tile pattern", "reference frames", "frame attention", "video sparse attention",
                            "sparse attention"],
            inputs=[
                io.Model.Input("model", tooltip="A video Diffusion Transformer whose token layout is known; a single frame stays dense."),
                io.Int.Input("ref_frames", default=4, min=1, max=512,
                    tooltip="Reference frames, in latent frames, that see and are seen by every frame. More keep motion and are slower; "
                            "as many as the clip has change nothing. Unused with a plan."),
                io.Combo.Input("ref_layout", options=list(LAYOUTS),
                    tooltip="Where they are: evenly spaced from the first frame to the last, at the start, or at the end. A plan that says its own wins."),
                io.String.Input("plan", default="", multiline=True,
                    tooltip='A number for each block in place of ref_frames, from Attention Tile Search or written by hand: {"0": "dense", "1": 2}. '
                            "Blocks that it does not name stay dense. Empty: ref_frames everywhere."),
                *where_inputs(),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with tiles of frames. Connect it to the sampler or the next node.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, ref_frames, ref_layout, plan, **shared):
        method, fields = Tile(ref_frames, ref_layout, plan), where(**shared)
        if method.planned:  # so that a plan for another model is refused as a list of blocks is
            chosen = fields["blocks"]
            fields["blocks"] = frozenset(method.blocks) & (chosen if chosen is not None else frozenset(method.blocks))
        feature = AttentionFeature(cls.hidden.unique_id, "Attention Tile", method=method, **fields)
        return io.NodeOutput(attach(model, feature))
