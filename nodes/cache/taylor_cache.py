from comfy_api.latest import io

from ...methods.cache.taylor import BASES, MAX_ORDER, allowed_order
from ...patching.cache import TaylorBlocks, TaylorOutput
from ...patching.run import attach
from ...patching.widgets import percents


class TaylorCache(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraTaylorCache",
            display_name="Taylor Cache",
            category="Tessera/cache",
            description="Computes the model fully at one evaluation in `interval` and forecasts the others from how "
            "its output has been changing. Works with stock weights on every Diffusion Transformer.",
            search_aliases=["TaylorSeer", "TeaCache", "WaveSpeed", "First Block Cache", "FBCache", "MagCache",
                            "EasyCache", "cache-dit", "skip steps", "speed up"],
            inputs=[
                io.Model.Input("model", tooltip="Any Diffusion Transformer."),
                io.Int.Input("interval", default=3, min=1, max=20,
                    tooltip="One full evaluation in this many; the rest are forecast. Higher is faster and less exact. 1 is off."),
                io.Int.Input("order", default=1, min=0, max=MAX_ORDER,
                    tooltip="Order of the forecast. 0 reuses the last output, 1 continues its slope. Higher follows curves "
                            "but may overshoot; holds order + 1 outputs per prompt in memory."),
                io.Int.Input("warmup", default=3, min=0, max=20,
                    tooltip="Evaluations at the start that are always computed. Higher keeps the composition closer to the plain run."),
                io.Int.Input("tail_full", default=1, min=0, max=10,
                    tooltip="Last sampler steps that are always computed. Higher keeps fine detail."),
                io.Combo.Input("level", options=["last_block", "output"],
                    tooltip="What is forecast: the output of the last transformer block (the final layer still sees the true "
                            "timestep), or the model's whole prediction (least memory, works on unknown models too)."),
                io.Combo.Input("basis", options=list(BASES), advanced=True,
                    tooltip="taylor_paper is TaylorSeer's form. newton is exact for polynomials but swings more; order 3 and 4 need interval 3 or less."),
                io.Combo.Input("variable", options=["auto", "step", "sigma"], advanced=True,
                    tooltip="What the forecast extrapolates over. auto: sigma for flow models, step for the rest."),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01, round=0.001, advanced=True,
                    tooltip="Part of the noise schedule after which evaluations may be forecast, 0 to 1. Higher leaves more of the start exact."),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, round=0.001, advanced=True,
                    tooltip="Part of the noise schedule up to which evaluations may be forecast, 0 to 1. Lower leaves more of the end exact."),
                io.Combo.Input("cache_device", options=["gpu", "cpu"], advanced=True,
                    tooltip="Where stored outputs are held. cpu saves VRAM and costs a transfer at each evaluation."),
                io.Combo.Input("cache_dtype", options=["model", "float32", "bfloat16"], advanced=True,
                    tooltip="Precision of stored outputs. model keeps the model's own; bfloat16 halves the memory of fp32."),
                io.Combo.Input("multi_eval", options=["count_each", "skip_whole_steps"], advanced=True,
                    tooltip="For samplers that evaluate several times a step (heun, dpm_2): decide for each evaluation, or for whole steps."),
                io.Combo.Input("unsupported", options=["error", "warn"], advanced=True,
                    tooltip="On a model whose blocks are unknown: stop with a sentence, or log it and leave the model as it is."),
                io.Boolean.Input("cache_with_control", default=True, optional=True, advanced=True,
                    tooltip="Forecast also while a ControlNet acts. It is computed anew whenever the control starts, ends or "
                            "jumps. Off computes every evaluation under control: exact and slow."),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with the cache. Connect it to the sampler.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, interval, order, warmup, tail_full, level, basis, variable, start_percent, end_percent,
                cache_device, cache_dtype, multi_eval, unsupported, cache_with_control=True):  # fmt: skip
        feature = (TaylorBlocks if level == "last_block" else TaylorOutput)(
            cls.hidden.unique_id,
            unsupported=unsupported,
            interval=interval,
            order=allowed_order(basis, order, interval),
            warmup=warmup,
            tail_full=tail_full,
            basis=basis,
            variable=variable,
            percents=percents(start_percent, end_percent),
            cache_device=cache_device,
            cache_dtype=cache_dtype,
            multi_eval=multi_eval,
            cache_with_control=cache_with_control,
        )
        return io.NodeOutput(attach(model, feature))
