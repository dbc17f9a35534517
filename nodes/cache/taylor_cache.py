from comfy_api.latest import io

from ...methods.cache.taylor import BASES, MAX_ORDER, allowed_order, allowed_variable
from ...patching.cache_blocks import StackCache
from ...patching.cache_each import ModuleCache, ResidualCache
from ...patching.cache_output import OutputCache
from ...patching.cache_widgets import cached, own, profiled, warmup_inputs, where_cached
from ...patching.run import attach

LEVELS = {"last_block": StackCache, "block_residual": ResidualCache, "module": ModuleCache, "output": OutputCache}


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
                *warmup_inputs(),
                io.Combo.Input("level", options=list(LEVELS),
                    tooltip="What is forecast: the output of the last transformer block (the final layer still sees the true "
                            "timestep), what each block adds, the attention and MLP outputs in every block (both hold many "
                            "times more memory), or the model's whole prediction (least memory, works on unknown models too)."),
                io.Combo.Input("basis", options=list(BASES), advanced=True,
                    tooltip="taylor_paper is TaylorSeer's form. newton is exact for polynomials but swings more; order 3 and 4 need interval 3 or less."),
                io.Combo.Input("variable", options=["auto", "step", "sigma"], advanced=True,
                    tooltip="What the forecast extrapolates over. auto: the step, which loses less on trained models; sigma where steps are very uneven."),
                *where_cached(),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with the cache. Connect it to the sampler.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, **inputs):
        inputs = profiled("Taylor Cache", inputs)
        given, level = own(inputs), inputs.pop("level")
        allowed_order(inputs["basis"], inputs["order"], inputs["interval"])
        allowed_variable(inputs["basis"], inputs["variable"])
        return io.NodeOutput(attach(model, LEVELS[level](cls.hidden.unique_id, given=given, **cached(**inputs))))
