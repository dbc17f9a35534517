from comfy_api.latest import io

from ...methods.cache.grain import CELLS, MEASURES
from ...patching.cache_widgets import profiled, where_cached
from ...patching.dynamic_grain import DynamicGrain as Feature
from ...patching.run import attach
from ...patching.widgets import parse_blocks, percents


class DynamicGrain(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraDynamicGrain",
            display_name="Dynamic Grain",
            category="Tessera/cache",
            description="Smooth cells of image tokens go through the blocks as one token and are restored after each, so "
            "the model computes fewer tokens where the picture is flat. Works with stock weights.",
            search_aliases=["D2iT", "DVAE", "dynamic grain transformer", "token merging", "ToMe", "ToMeSD", "ToMA",
                            "token downsampling", "merge tokens", "speed up"],
            inputs=[
                io.Model.Input("model", tooltip="A Diffusion Transformer whose token layout is known."),
                io.Float.Input("coarse_fraction", default=0.5, min=0.0, max=0.95, step=0.01, round=0.001,
                    tooltip="Share of the cells that become one token, 0 to 0.95, the smoothest first. Higher is faster and "
                            "less exact. 0 is off."),
                io.Combo.Input("cell", options=list(CELLS),
                    tooltip="Tokens of a cell: 2x2 or 4x4 of one frame, 2x2x2 over two frames of a video. Larger is faster and coarser."),
                io.Combo.Input("measure", options=list(MEASURES),
                    tooltip="What smooth means, of the last prediction of the clean latent: low variance (cheap), or low entropy "
                            "(as the paper)."),
                io.Float.Input("start_percent", default=0.2, min=0.0, max=1.0, step=0.01, round=0.001,
                    tooltip="Part of the noise schedule from which it acts, 0 to 1. Higher keeps the composition exact."),
                io.Float.Input("end_percent", default=0.9, min=0.0, max=1.0, step=0.01, round=0.001,
                    tooltip="Part of the noise schedule up to which it acts, 0 to 1. Lower keeps fine detail exact."),
                io.Int.Input("refresh_every", default=4, min=1, max=20, advanced=True,
                    tooltip="Evaluations that one map of cells serves. Higher measures less often and follows the picture later."),
                io.Boolean.Input("mass_correction", default=True, advanced=True,
                    tooltip="A merged token weighs in attention as all its tokens did. Off lets flat regions fade from attention, "
                            "and keeps attention without a mask, which some backends need."),
                io.String.Input("blocks", default="all", advanced=True,
                    tooltip='Transformer blocks that it acts on, counted from 0 over the whole stack: "all", or like "2-18,25". '
                            "Fewer blocks are slower and closer to the plain picture."),
                io.Combo.Input("unsupported", options=["error", "warn"], advanced=True,
                    tooltip="On a model that cannot be served: stop with a sentence, or log it and leave the model as it is."),
                io.Mask.Input("mask", optional=True,
                    tooltip="Cells that it touches are never merged, e.g. faces or text. Several pictures are spread over a video."),
                *(widget for widget in where_cached() if widget.id == "profile"),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL that merges smooth cells. Connect it to the sampler.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, **inputs):
        inputs = profiled("Dynamic Grain", inputs)
        feature = Feature(
            cls.hidden.unique_id,
            fraction=inputs.pop("coarse_fraction"),
            percents=percents(inputs.pop("start_percent"), inputs.pop("end_percent")),
            blocks=parse_blocks(inputs.pop("blocks")),
            **inputs,
        )
        return io.NodeOutput(attach(model, feature))
