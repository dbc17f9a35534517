from comfy_api.latest import io

from ...methods.cache.region import KEEPS, METRICS, RATIOS, Choice, parse_resets
from ...patching.cache_widgets import profiled, where_cached
from ...patching.region import DTYPES, RegionFeature
from ...patching.run import attach

SHARED = {"cache_device", "unsupported", "schedule", "profile"}


class RegionAdaptiveSampling(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraRegionAdaptiveSampling",
            display_name="Region-Adaptive Sampling",
            category="Tessera/cache",
            description="At most steps only the part of the picture where the most happens goes through the model; the rest "
            "goes on with its last prediction. Works with stock weights, with CFG, batches and pictures of any shape.",
            search_aliases=["RAS", "Regional Adaptive Sampling", "Region Adaptive", "token skipping", "token pruning",
                            "sample_ratio", "ToCa", "speed up"],
            inputs=[
                io.Model.Input("model", tooltip="FLUX, Chroma, SD3, Qwen-Image, Wan, HunyuanVideo, Lumina 2 or Z-Image."),
                io.Float.Input("sample_ratio", default=0.5, min=0.05, max=1.0, step=0.05, round=0.001,
                    tooltip="Share of image tokens that such a step computes, 0 to 1. Lower is faster and less exact. 1 is off."),
                io.Int.Input("start_step", default=4, min=1, max=50,
                    tooltip="Sampler steps at the start that compute everything. Higher keeps the composition closer to the plain run."),
                io.Int.Input("reset_every", default=8, min=0, max=50,
                    tooltip="From then on every such step computes everything again and brings all keys and values up to date. "
                            "Lower is closer to the plain run. 0: never."),
                io.Combo.Input("metric", options=list(METRICS),
                    tooltip="What is taken for activity of a token's prediction: its spread over channels, its length, or the "
                            "length of its last change."),
                io.Combo.Input("keep", options=list(KEEPS),
                    tooltip="Which tokens are computed: those of high activity, of low, or some of both."),
                io.Float.Input("starvation", default=0.5, min=0.0, max=2.0, step=0.05, round=0.001,
                    tooltip="How fast a token that is left out gains rank, per step. At 0.5 or more none waits for more than "
                            "four steps at sample_ratio 0.5; 0 lets tokens wait until everything is computed."),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, round=0.001, advanced=True,
                    tooltip="Part of the noise schedule up to which tokens may be left out, 0 to 1. Lower leaves more of the end exact."),
                io.String.Input("reset_steps", default="", advanced=True,
                    tooltip="Steps that compute everything, from 0 and separated by commas, as in 12, 22. They replace reset_every."),
                io.Float.Input("mixed_fraction", default=0.3, min=0.0, max=1.0, step=0.05, round=0.001, advanced=True,
                    tooltip="With keep mixed: share of the computed tokens that are taken from the low end, 0 to 1."),
                io.Combo.Input("ratio_schedule", options=list(RATIOS), advanced=True,
                    tooltip="Whether the share of computed tokens stays, grows or falls over the run; sample_ratio is its mean."),
                io.Int.Input("round_to", default=64, min=1, max=128, advanced=True,
                    tooltip="Computed tokens are rounded up to a multiple of this, of at most a sixteenth of the picture. 64 suits GPUs."),
                io.Combo.Input("kv_cache_dtype", options=list(DTYPES), advanced=True,
                    tooltip="Precision of the kept keys and values. fp8_e4m3 takes half the memory of bfloat16."),
                io.Mask.Input("region_mask", optional=True,
                    tooltip="What is always computed: a face, or the part that is inpainted."),
                *(widget for widget in where_cached() if widget.id in SHARED),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with Region-Adaptive Sampling. Connect it to the sampler.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, **inputs):
        inputs = profiled("Region-Adaptive Sampling", inputs)
        how = ("sample_ratio", "metric", "keep", "mixed_fraction", "starvation", "round_to", "ratio_schedule")
        choice = Choice(*(inputs.pop(name) for name in how))
        resets = parse_resets(inputs.pop("reset_steps"))
        return io.NodeOutput(
            attach(model, RegionFeature(cls.hidden.unique_id, choice=choice, reset_steps=resets, **inputs))
        )
