from comfy_api.latest import io

from ...methods.measure.patterns import PATTERNS, Settings
from ...patching.probe import Probe, probe
from ...patching.sampling import Job
from ...patching.widgets import parse_blocks


class AttentionProbe(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraAttentionProbe",
            display_name="Attention Probe",
            category="Tessera/measure",
            description="Answers which value to set on a sparse attention node: samples once with the plain MODEL and "
            "measures, for each block and step, how much of the attention a pattern would keep. Draws the map and suggests "
            "the value for the share that you want kept.",
            search_aliases=["attention map", "sparsity", "recall", "density", "calibrate attention", "which radius",
                            "heatmap", "profile attention"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The plain MODEL, before any attention node. It is left as it is."),
                io.Conditioning.Input("positive", tooltip="A prompt like those that you use."),
                io.Conditioning.Input("negative", tooltip="Negative prompt; unused at cfg 1."),
                io.Latent.Input("latent", tooltip="Start latent; its size decides how sparse attention may be."),
                io.Noise.Input("noise", tooltip="Noise, for example from RandomNoise."),
                io.Sampler.Input("sampler", tooltip="Sampler, for example from KSamplerSelect."),
                io.Sigmas.Input("sigmas", tooltip="Noise schedule, for example from BasicScheduler."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="Guidance. 1 evaluates the positive prompt alone."),
                io.Combo.Input("pattern", options=list(PATTERNS),
                    tooltip="What is kept. blocks: the patches that score highest (Log-Linear Sparse Attention and block top-k). window: a disc (Local "
                            "Window Attention). tokens: the very best keys, a bound for every method. diagonal: the token's own patch (Diagonal Attention). tile: its own and some reference frames (Attention Tile)."),
                io.Float.Input("density", default=0.25, min=0.001, max=1.0, step=0.01, round=0.001,
                    tooltip="Share of the query-key pairs kept in the map, 0 to 1. A window, a diagonal and tiles take their first size with this density or more."),
                io.Float.Input("recall", default=0.9, min=0.0, max=1.0, step=0.01, round=0.001,
                    tooltip="Share of the attention mass to keep, 0 to 1, for which values are suggested. Higher suggests denser, closer to the plain picture and slower."),
                io.Int.Input("block", default=16, min=1, max=1024,
                    tooltip="Pattern blocks: tokens of a patch. Larger patches are coarser and need more density."),
                io.Int.Input("frames", default=-1, min=-1, max=512, advanced=True,
                    tooltip="Pattern window on video: reach in latent frames to either side, as temporal_radius. -1 reaches all frames."),
                io.Int.Input("steps", default=4, min=1, max=1000, advanced=True,
                    tooltip="Steps that are measured, spread over the schedule with the first and the last. More take longer."),
                io.Int.Input("queries", default=128, min=1, max=4096, advanced=True,
                    tooltip="Image tokens whose attention is measured in each block and step. More are steadier, and take more time and memory."),
                io.String.Input("blocks", default="all", advanced=True,
                    tooltip='Transformer blocks that are measured, counted from 0 over the whole stack: "all", or like "2-18,25".'),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, advanced=True,
                    tooltip="Which tokens are sampled. The same seed measures the same ones."),
            ],
            outputs=[
                io.Image.Output(display_name="map", tooltip="Rows are blocks, columns steps, cells the share of attention kept; at the right what each block needs."),
                io.Custom("TESSERA_REPORT").Output(display_name="report", tooltip="All numbers, as JSON; also in the run's history."),
                io.Float.Output(display_name="density", tooltip="The smallest density that keeps the wanted share; connect it to an attention node. The largest where none does."),
                io.Int.Output(display_name="amount", tooltip="The same as a whole number: patches (topk of Log-Linear Sparse Attention), tokens, radius, tokens of a patch, or frames."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, positive, negative, latent, noise, sampler, sigmas, cfg, pattern, density, recall, block,
                frames, steps, queries, blocks, seed):  # fmt: skip
        job = Job(positive, negative, latent, sampler, sigmas, noise, cfg)
        settings = Settings(pattern, density, block, frames)
        asked = Probe(settings, recall, steps, queries, seed, parse_blocks(blocks))
        picture, report, found, value = probe(model, job, asked)
        return io.NodeOutput(picture, report, found, value, ui={"tessera_report": [report]})
