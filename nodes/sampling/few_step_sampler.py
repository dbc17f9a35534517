from comfy_api.latest import io

from ...methods.sampling.few_step import MODES
from ...patching.few_step import sampler_of


class FewStepSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraFewStepSampler",
            display_name="Few-Step Sampler",
            category="Tessera/sampling",
            description="Samples models that were distilled to a few steps: Turbo, Lightning, DMD2, LCM and consistency models and LoRAs, with as much "
            "fresh noise in each step as they were trained for.",
            search_aliases=["LCM", "DMD2", "Turbo", "Lightning", "consistency", "multistep consistency distillation", "Efficient-vDiT", "LinVideo",
                            "FastWan", "lightx2v", "PCM"],
            inputs=[
                io.Combo.Input("mode", options=list(MODES),
                    tooltip="ode_jump: no fresh noise, for consistency models of several segments and Turbo models. renoise: to the clean picture and "
                            "noised anew in every step, for DMD2 and LCM. gamma: between the two."),
                io.Float.Input("gamma", default=0.5, min=0.0, max=1.0, step=0.05, round=0.001,
                    tooltip="With mode gamma: share of fresh noise in each step, 0 (ode_jump) to 1 (renoise). Higher mends errors of earlier steps and "
                            "changes the picture more."),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustomAdvanced, with the sigmas of Segment Sigmas or Few-Step Sigmas.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, mode, gamma):
        return io.NodeOutput(sampler_of(mode, gamma))
