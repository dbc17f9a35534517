from typing import Any

from comfy_api.latest import io

from ...methods.cache.confidence import METRICS, OVER, Confidence, Predicted
from ...methods.cache.taylor import BASES, allowed_order, allowed_variable
from ...patching.cache import FOREVER, CacheFeature
from ...patching.cache_blocks import StackCache
from ...patching.cache_output import OutputCache
from ...patching.cache_widgets import cached, own, profiled, warmup_inputs, where_cached
from ...patching.run import attach

NAME = "Confidence Taylor Cache"
PRESETS = {"flux_quality": 0.03, "flux_fast": 0.13, "wan": 0.18, "wan_fast": 0.36}  # the paper's official settings


class ConfidenceTaylorCache(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraConfidenceTaylorCache",
            display_name=NAME,
            category="Tessera/cache",
            description="Computes the first block at every evaluation and forecasts it too. Where that forecast is good, the "
            "rest of the model is forecast; where it is not, the evaluation is computed.",
            search_aliases=["CG-Taylor", "Forecasting When to Forecast", "TaylorSeer", "First Block Cache", "FBCache",
                            "WaveSpeed", "DBCache", "cache-dit", "TeaCache", "EasyCache", "adaptive cache", "speed up"],
            inputs=[
                io.Model.Input("model", tooltip="Any Diffusion Transformer."),
                io.Float.Input("threshold", default=0.08, min=0.0, max=2.0, step=0.005, round=0.001,
                    tooltip="Largest error of the first block's forecast, relative, at which the rest is forecast as well. "
                            "Higher is faster and less exact. 0 is off."),
                io.Combo.Input("preset", options=["custom", *PRESETS],
                    tooltip="The paper's thresholds, in place of threshold: flux_quality 0.03, flux_fast 0.13, wan 0.18, wan_fast 0.36."),
                io.Int.Input("first_order", default=1, min=0, max=3,
                    tooltip="Order of the first block's forecast. Higher judges more mildly where features curve. The paper's Wan uses 3."),
                io.Int.Input("last_order", default=1, min=0, max=3,
                    tooltip="Order of the forecast that replaces the model. 0 reuses the last output, 1 continues its slope."),
                *warmup_inputs(warmup=5),
                io.Int.Input("max_consecutive", default=4, min=-1, max=20,
                    tooltip="Most evaluations in a row that may be forecast. Lower is more exact. -1 sets no limit, 0 is off."),
                io.Combo.Input("level", options=["last_block", "output"],
                    tooltip="last_block: the first block judges, the last block's output is forecast. output: for models whose "
                            "blocks are unknown, judges by how far the input has moved (EasyCache's measure; other thresholds)."),
                io.Combo.Input("gate_on", options=list(OVER), advanced=True,
                    tooltip="first_stream: one error over the batch, of the first prompt of an evaluation. max: its worst picture. "
                            "all_rows: all prompts of the first call, which joined and separate CFG see differently."),
                io.Combo.Input("metric", options=list(METRICS), advanced=True,
                    tooltip="How the first block's error is measured: relative mean difference, relative RMS difference, or 1 - cosine."),
                io.Combo.Input("variable", options=["auto", "step", "sigma"], advanced=True,
                    tooltip="What forecasts extrapolate over. auto: the step, which loses less on trained models; sigma where steps are very uneven."),
                io.Boolean.Input("update_first_every_step", default=False, advanced=True,
                    tooltip="Let the first block's forecast follow every evaluation. It is then better than the one it stands for: "
                            "more is skipped at the same threshold."),
                io.Int.Input("first_blocks", default=1, min=1, max=16, advanced=True,
                    tooltip="Blocks that are always computed and whose output is judged (DBCache's Fn). Higher is more exact and slower."),
                io.Combo.Input("basis", options=list(BASES), advanced=True,
                    tooltip="Form of the forecasts, as in Taylor Cache."),
                *where_cached(),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with the cache. Connect it to the sampler.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, **inputs):
        profile = inputs.get("profile")
        inputs = profiled(NAME, inputs)
        preset = inputs.pop("preset")
        if preset != "custom" and (profile is None or "threshold" not in profile.inputs):
            inputs["threshold"] = PRESETS[preset]
        given = {"preset": "custom", **own(inputs)}
        return io.NodeOutput(attach(model, _feature(cls.hidden.unique_id, given=given, **inputs)))


def _feature(
    node: str, threshold: float, first_order: int, last_order: int, max_consecutive: int, level: str, gate_on: str,
    metric: str, update_first_every_step: bool, first_blocks: int, **rest: Any,
) -> CacheFeature:  # fmt: skip
    interval = 1 if threshold <= 0 else FOREVER if max_consecutive < 0 else max_consecutive + 1
    settings = {**cached(**rest), "name": NAME, "interval": interval, "order": last_order}
    allowed_order(rest["basis"], max(first_order, last_order), interval)
    allowed_variable(rest["basis"], rest["variable"])
    if level == "output":
        if gate_on == "all_rows":
            raise ValueError(f"{NAME} judges one prompt at level output. Set gate_on to first_stream or max.")
        return OutputCache(node, gate=lambda run: lambda: Predicted(threshold, gate_on), copies=3, **settings)
    judged = CacheFeature(node, **{**settings, "order": first_order})

    def gate(run):
        history = judged.history(run)
        return lambda: Confidence(threshold, history(), metric, gate_on, update_first_every_step)

    return StackCache(node, gate=gate, first_blocks=first_blocks, copies=first_order + 1, **settings)
