from comfy_api.latest import io

from ...methods.attention.tile import LAYOUTS
from ...methods.measure.tiles import METRICS
from ...patching.sampling import Job
from ...patching.tile_search import parse_candidates, search


class AttentionTileSearch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraAttentionTileSearch",
            display_name="Attention Tile Search",
            category="Tessera/measure",
            description="Samples once as usual and measures, for each block of a video model, what Attention Tile would lose "
            "with so many reference frames. Gives a plan for Attention Tile that stays within a loss, or within a share of "
            "the work.",
            search_aliases=["Efficient-vDiT", "layer-wise search", "tile plan", "calibrate sparse attention", "profile attention",
                            "sparsity search"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that Attention Tile will act on, as it will be sampled (LoRA included)."),
                io.Conditioning.Input("positive", tooltip="A prompt like those to come; the result hardly depends on it."),
                io.Conditioning.Input("negative", tooltip="Its negative prompt; unused at cfg 1."),
                io.Latent.Input("latent", tooltip="Start latent of the size and length to come, of at least 2 latent frames."),
                io.Noise.Input("noise", tooltip="Noise, for example from RandomNoise."),
                io.Sampler.Input("sampler", tooltip="Sampler, for example from KSamplerSelect."),
                io.Sigmas.Input("sigmas", tooltip="Noise schedule, for example from BasicScheduler. All of it is sampled, once."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="Guidance. Above 1 the negative prompt is measured too."),
                io.String.Input("candidates", default="1,2,3,4,6,8",
                    tooltip="Numbers of reference frames to try, at most 16 of them. More are finer and take longer."),
                io.Combo.Input("budget", options=["loss", "density"],
                    tooltip="What the plan must keep: a loss in every block (threshold), or a share of the work over all blocks (density)."),
                io.Float.Input("threshold", default=0.05, min=0.0, max=1.0, step=0.005, round=0.0001,
                    tooltip="With budget loss: each block takes the fewest reference frames whose loss stays under this, 0 to 1. Lower is closer to the plain "
                            "clip and slower; 0 leaves all dense."),
                io.Float.Input("density", default=0.5, min=0.0, max=1.0, step=0.05, round=0.001,
                    tooltip="With budget density: part of the tiles of frames that all blocks together may compute, 0 to 1. Lower is faster and loses more."),
                io.Int.Input("probe_steps", default=4, min=1, max=16, advanced=True,
                    tooltip="Steps of the run that are measured, evenly spaced. More are steadier and take longer."),
                io.Combo.Input("metric", options=list(METRICS), advanced=True,
                    tooltip="The loss: squared error of the attention output relative to its size, or one minus the cosine between the two."),
                io.Combo.Input("ref_layout", options=list(LAYOUTS), advanced=True,
                    tooltip="Where the reference frames are; choose the same in Attention Tile."),
            ],
            outputs=[
                io.String.Output(display_name="plan", tooltip="Connect it to `plan` of Attention Tile, or keep the text for later."),
                io.Latent.Output(display_name="latent", tooltip="The clip of this run, which is the plain one."),
                io.Custom("TESSERA_REPORT").Output(display_name="report", tooltip="Loss of every candidate in every block, as JSON; also in the run's history."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, positive, negative, latent, noise, sampler, sigmas, cfg, candidates, budget, threshold, density,
                probe_steps, metric, ref_layout):  # fmt: skip
        job = Job(positive, negative, latent, sampler, sigmas, noise, cfg)
        keeps = {"threshold": threshold} if budget == "loss" else {"budget": density}
        settings = parse_candidates(candidates), ref_layout, metric, probe_steps
        plan, outcome, report = search(model, job, *settings, **keeps, node=cls.hidden.unique_id)
        made = {**latent, "samples": outcome.samples}
        return io.NodeOutput(plan, made, report, ui={"tessera_report": [report]})
