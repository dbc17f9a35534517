from comfy_api.latest import io

from ...methods.sampling.few_step import EDGES, numbers, segment_points
from ...patching.few_step import Shift, schedule


class SegmentSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraSegmentSigmas",
            display_name="Segment Sigmas",
            category="Tessera/sampling",
            description="The schedule of a multi-step consistency model: one step for each segment that it was distilled to jump over.",
            search_aliases=["multistep consistency distillation", "MCD", "Efficient-vDiT", "PCM", "phased consistency", "LCM sigmas", "scheduler"],
            inputs=[
                io.Model.Input("model", tooltip="The distilled MODEL; its shift maps the edges to sigmas."),
                io.Int.Input("segments", default=4, min=1, max=16,
                    tooltip="Segments that the model was distilled with, one step each. Another number than in training blurs."),
                io.Int.Input("grid", default=50, min=10, max=1000, tooltip="With pcm_floor: fine steps of the training, of which the edges are some; 50 for PCM."),
                io.Combo.Input("edges", options=list(EDGES),
                    tooltip="Where the segments begin. pcm_floor: rounded down onto the training's grid. uniform_sigma, uniform_t: evenly spaced sigmas or "
                            "parts of the schedule. custom: as given."),
                io.Float.Input("shift", default=0.0, min=0.0, max=100.0, step=0.1, round=0.001,
                    tooltip="Shift of a flow model's schedule, higher stays longer at much noise; 0 takes the MODEL's own."),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.05, round=0.001,
                    tooltip="Part of the schedule to sample, 1 is all. It starts at the nearest edge: between edges the model has learnt no jump."),
                io.String.Input("custom", default="1, 0.75, 0.5, 0.25",
                    tooltip="With edges custom: parts of the schedule at which the segments begin, from 1 (noise) falling towards 0 (clean)."),
            ],
            outputs=[
                io.Sigmas.Output(display_name="sigmas", tooltip="For SamplerCustomAdvanced, with Few-Step Sampler or euler."),
                io.String.Output(display_name="report", tooltip="The sigmas, and the edge that denoise was moved to."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, segments, grid, edges, shift, denoise, custom):
        sigma = Shift(model, shift, "Segment Sigmas")
        if edges == "custom":
            points = [*numbers(custom, "custom", 1.0), 0.0]
        else:
            points = segment_points(edges, segments, grid, sigma)
        sigmas, lines = schedule(points, sigma, denoise)
        return io.NodeOutput(sigmas, "\n".join(lines))
