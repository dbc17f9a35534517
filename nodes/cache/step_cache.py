from comfy_api.latest import io

from ...patching.cache_widgets import cached, own, profiled, warmup_inputs, where_cached
from ...patching.run import attach
from ...patching.step_cache import FILLS, LEVELS, POLICIES, step_feature


class StepCache(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraStepCache",
            display_name="Step Cache",
            category="Tessera/cache",
            description="Skips evaluations of the model where little changes, by one of seven published policies: each "
            "measures something cheap and decides anew at every evaluation. Works with stock weights.",
            search_aliases=["TeaCache", "First Block Cache", "FBCache", "WaveSpeed", "ParaAttention", "DBCache", "cache-dit",
                            "MagCache", "EasyCache", "LazyCache", "FORA", "PAB", "Pyramid Attention Broadcast", "FoCa",
                            "skip steps", "speed up"],
            inputs=[
                io.Model.Input("model", tooltip="Any Diffusion Transformer. EasyCache and FORA also work on unknown models."),
                io.Combo.Input("policy", options=list(POLICIES),
                    tooltip="What decides. FBCache: how much the first block's work changed. EasyCache: how fast the output follows "
                            "its input. TeaCache: the first block's modulated input, through a fitted polynomial. MagCache: recorded "
                            "magnitudes (needs `calibration`). DBCache: FBCache over several blocks. FORA: one evaluation in "
                            "`interval`. PAB: attention outputs alone, one in `interval`."),
                io.Float.Input("threshold", default=0.1, min=0.0, max=10.0, step=0.005, round=0.0001,
                    tooltip="Change that is let pass, as a fraction. Higher skips more and is less exact; 0 is off, whatever the policy. "
                            "Published: FBCache 0.08 to 0.12, DBCache 0.08, TeaCache on FLUX 0.25, 0.4 or 0.6, MagCache 0.06, EasyCache "
                            "0.025 to 0.05 (ComfyUI's own 0.2). FORA and PAB only ask whether it is 0."),
                io.Int.Input("interval", default=3, min=1, max=20,
                    tooltip="FORA: one full evaluation in this many. PAB: the same for self-attention (published: 2). Higher is faster and "
                            "less exact; 1 is off. Other policies have no interval."),
                *warmup_inputs(),
                io.Int.Input("max_consecutive", default=-1, min=-1, max=10000,
                    tooltip="Most evaluations skipped in a row, -1 for any number. Lower is closer to the plain run. MagCache was published "
                            "with 2, up to 6."),
                io.Combo.Input("fill", options=["auto", *FILLS],
                    tooltip="What stands in for a skipped evaluation. residual: the input plus what the last computed one added. reuse: its "
                            "output. taylor1, taylor2: forecasts of order 1 and 2 from earlier outputs, often closer. foca: a forecast that "
                            "is corrected by the slope of computed outputs. auto: as the policy was published. PAB always reuses."),
                io.Combo.Input("level", options=list(LEVELS), advanced=True,
                    tooltip="What is skipped: the block stack (the final layer still sees the true timestep), or the whole model. auto: the "
                            "stack where its blocks are known, the whole model for EasyCache and on unknown models. PAB has no level: it acts on attention."),
                io.Int.Input("first_blocks", default=-1, min=-1, max=100, advanced=True,
                    tooltip="DBCache: blocks at the start that always run and are measured. More decide better and save less. -1: 8 as "
                            "published, or a third of a smaller stack."),
                io.Int.Input("last_blocks", default=0, min=0, max=100, advanced=True,
                    tooltip="DBCache: blocks at the end that always run, after the filled-in ones. More are closer and save less."),
                io.String.Input("coefficients", default="auto", advanced=True,
                    tooltip="TeaCache: its polynomial as numbers, the highest power first. auto: the calibration's where one is connected, "
                            "else the published one of this model."),
                io.Float.Input("retention", default=0.2, min=0.0, max=1.0, step=0.05, round=0.01, advanced=True,
                    tooltip="MagCache: part of the steps at the start that is always computed, 0 to 1 (published: 0.2). Higher is closer."),
                io.Int.Input("cross_interval", default=6, min=1, max=20, advanced=True,
                    tooltip="PAB: attention to the text is computed at one evaluation in this many (published: 6). 1 computes all."),
                *where_cached(),
                io.Custom("TESSERA_CACHE_CALIBRATION").Input("calibration", optional=True,
                    tooltip="From Calibrate Cache: MagCache's ratios and a polynomial for TeaCache, recorded on your model."),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with the cache. Connect it to the sampler.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, **inputs):
        inputs = profiled("Step Cache", inputs)
        inputs = cached(given=own(inputs), **inputs)
        return io.NodeOutput(attach(model, step_feature(cls.hidden.unique_id, model, "Step Cache", inputs)))
