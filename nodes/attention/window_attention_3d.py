from comfy_api.latest import io

from ...methods.attention.window_3d import SHIFTS, TEXT, Window3D
from ...patching.attention import AttentionFeature
from ...patching.run import attach
from ...patching.widgets import where, where_inputs


class WindowAttention3d(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraWindowAttention3d",
            display_name="Window Attention 3D",
            category="Tessera/attention",
            description="Image tokens attend inside windows of frames, rows and columns that do not overlap, and to the "
            "text; every n-th block stays global and joins the windows. Works with stock weights; a window as large as "
            "the token grid changes nothing.",
            search_aliases=["DiT-3D", "LinGen", "TESA", "LaMamba", "Swin", "shifted window", "window attention",
                            "block attention", "sparse attention"],
            inputs=[
                io.Model.Input("model", tooltip="A Diffusion Transformer whose token layout is known."),
                io.Int.Input("wt", default=8, min=1, max=512,
                    tooltip="Window along time, in latent frames. Higher keeps more motion and is slower; pictures have one frame."),
                io.Int.Input("wh", default=16, min=1, max=512,
                    tooltip="Window along the height, in tokens (16 pixels each on FLUX, Wan and SD3). Higher is closer to the plain picture and slower."),
                io.Int.Input("ww", default=16, min=1, max=512,
                    tooltip="Window along the width, in tokens (16 pixels each on FLUX, Wan and SD3). Higher is closer to the plain picture and slower."),
                io.Combo.Input("shift", options=list(SHIFTS),
                    tooltip="none keeps the cuts in place; alternate moves them by half a window in every other windowed block, which windows need where no "
                            "block is global; always moves them. Nothing wraps around: windows at the border are smaller."),
                io.Int.Input("global_every", default=2, min=0, max=1000,
                    tooltip="Every n-th block stays dense and lets the windows agree: 2 is every other block. Higher is faster and lets the parts drift; "
                            "1 is the plain model, 0 leaves no block dense."),
                io.Combo.Input("text", options=list(TEXT), advanced=True,
                    tooltip="Where text stands in the same sequence (FLUX, SD3): dense lets every window see it, and the text see every window; "
                            "none cuts both in the windowed blocks, which is faster and follows the prompt less."),
                *where_inputs(),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with windows. Connect it to the sampler or the next node.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, wt, wh, ww, shift, global_every, text, **shared):
        feature = AttentionFeature(
            cls.hidden.unique_id,
            "Window Attention 3D",
            method=Window3D(wt, wh, ww, shift, global_every, text),
            **where(**shared),
        )
        return io.NodeOutput(attach(model, feature))
