from comfy_api.latest import io

from ...patching.flow_samplers import omega_euler


class OmegaEuler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraOmegaEuler",
            display_name="Omega Euler",
            category="Tessera/sampling",
            description="ACE-Step's own sampler: Euler steps whose contrast, the deviation from their mean, is scaled by up to a tenth. Works on every flow "
            "model.",
            search_aliases=["ACE-Step omega scale", "omega_scale", "FlowMatchEulerDiscrete", "granularity scale", "ACE-Step sampler", "music sampler"],
            inputs=[
                io.Float.Input("omega", default=10.0, min=-100.0, max=100.0, step=0.5, round=0.01,
                    tooltip="Maps onto a factor of 0.9 to 1.1 of each step's deviation from its mean: 0 is 1, plain Euler; 10 is 1.046. Higher is "
                            "livelier and harsher, below 0 flatter and smoother."),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustom or SamplerCustomAdvanced.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, omega):
        return io.NodeOutput(omega_euler(omega))
