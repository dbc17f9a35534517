import math

from comfy_api.latest import io

from ...methods.sampling.ltx_schedule import PRESETS, TOKENS, schedule


class LtxRealtimeSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraLtxRealtimeSchedule",
            display_name="LTX Realtime Schedule",
            category="Tessera/sampling",
            description="The schedules of LTX-Video: the two passes of its distilled models, 7 and 3 steps, which draw faster than the clip plays on a "
            "large GPU, and that of the full model.",
            search_aliases=["LTXVScheduler", "LTX-Video", "LTXV distilled", "manual sigmas", "realtime video", "two pass", "scheduler"],
            inputs=[
                io.Combo.Input("preset", options=list(PRESETS),
                    tooltip="distilled_pass1: the distilled model at two thirds of the size. distilled_pass2: after the latent upscaler, from sigma 0.91. "
                            "dev40: the full model, with the steps below."),
                io.Int.Input("steps", default=40, min=1, max=1000, tooltip="With dev40: steps. More are finer and slower; 40 is the authors' number."),
                io.Float.Input("terminal", default=0.1, min=0.0, max=0.99, step=0.01, round=0.001,
                    tooltip="With dev40: the last sigma above 0, 0 to 0.99. Higher leaves more to the decoder, which takes the last noise away; 0 does not stretch."),
                io.Latent.Input("latent", optional=True,
                    tooltip="With dev40: the latent to come; the more tokens it has, the longer the schedule stays at much noise. 4096 tokens without it."),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip="For SamplerCustomAdvanced; the authors sample with euler and cfg 1 when distilled.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, preset, steps, terminal, latent=None):
        tokens = TOKENS
        if latent is not None:
            samples = latent["samples"]
            samples = samples.unbind()[0] if getattr(samples, "is_nested", False) else samples  # video before sound
            tokens = math.prod(samples.shape[2:])
        return io.NodeOutput(schedule(preset, steps, tokens, terminal))
