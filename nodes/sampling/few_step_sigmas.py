from comfy_api.latest import io

from ...methods.sampling.few_step import PRESETS, numbers
from ...patching.few_step import Shift, schedule


class FewStepSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraFewStepSigmas",
            display_name="Few-Step Sigmas",
            category="Tessera/sampling",
            description="The schedules that models distilled to a few steps were trained for, or your own list of timesteps.",
            search_aliases=["LCM sigmas", "DMD2", "Turbo sigmas", "Lightning", "manual sigmas", "LinVideo", "FastWan", "lightx2v", "scheduler"],
            inputs=[
                io.Model.Input("model", tooltip="The distilled MODEL, or one with a distillation LoRA."),
                io.Combo.Input("preset", options=[*PRESETS, "custom"],
                    tooltip="Timesteps and shift: wan_dmd_4 and wan_lightx_4 for four-step Wan, flux_schnell_4 for FLUX schnell, turbo_8 for eight-step "
                            "flows. custom: as given below."),
                io.String.Input("timesteps", default="1000, 750, 500, 250",
                    tooltip="With custom: where the model is evaluated, in thousandths of the schedule from 1000 (noise) falling towards 0; one step each."),
                io.Float.Input("shift", default=0.0, min=0.0, max=100.0, step=0.1, round=0.001,
                    tooltip="Shift of a flow model's schedule, higher stays longer at much noise; 0 takes the preset's, with custom the MODEL's own."),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.05, round=0.001,
                    tooltip="Part of the schedule to sample, 1 is all. It starts at the nearest of the timesteps, the only ones that the model knows."),
            ],
            outputs=[
                io.Sigmas.Output(display_name="sigmas", tooltip="For SamplerCustomAdvanced, with Few-Step Sampler."),
                io.String.Output(display_name="report", tooltip="The sigmas, and the timestep that denoise was moved to."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, preset, timesteps, shift, denoise):
        steps, its = PRESETS.get(preset) or (numbers(timesteps, "timesteps", 1000.0), 0.0)
        own = its if shift == 0 else shift
        remedy = "set shift 0" if preset == "custom" else "take preset custom and shift 0"  # 0 is the preset's own
        sigma = Shift(model, own, "Few-Step Sigmas", remedy)
        sigmas, lines = schedule([*(t / 1000 for t in steps), 0.0], sigma, denoise)
        return io.NodeOutput(sigmas, "\n".join(lines))
