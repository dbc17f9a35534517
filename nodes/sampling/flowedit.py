from comfy_api.latest import io

from ...patching.flow_edit import FlowEditGuider, Settings


class Flowedit(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraFlowedit",
            display_name="FlowEdit",
            category="Tessera/sampling",
            description="Edits a picture, clip or song by a change of prompt, without inverting it: every step moves the source along the difference between "
            "what the two prompts want. Two evaluations a step, each with its own guidance.",
            search_aliases=["Flow Edit", "FlowEdit Guider", "inversion-free editing", "ACE-Step edit", "lyric edit", "prompt edit", "Fluxtapoz FlowEdit",
                            "edit guider"],
            inputs=[
                io.Model.Input("model", tooltip="A flow model: FLUX, SD3, Wan, ACE-Step, LTX and the like."),
                io.Conditioning.Input("source_positive", tooltip="What the source shows, in as much detail as the target's prompt."),
                io.Conditioning.Input("source_negative", tooltip="Its negative prompt; unused at cfg_source 1."),
                io.Conditioning.Input("target_positive", tooltip="What the result is to show."),
                io.Conditioning.Input("target_negative", tooltip="Its negative prompt; unused at cfg_target 1."),
                io.Float.Input("cfg_source", default=1.5, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="Guidance of the source prompt. 1.5 suits FLUX, 3.5 SD3."),
                io.Float.Input("cfg_target", default=5.5, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="Guidance of the target prompt. Higher edits more strongly. 5.5 suits FLUX, 13.5 SD3."),
                io.Float.Input("n_min", default=0.0, min=0.0, max=1.0, step=0.01, round=0.001,
                    tooltip="Share of the steps that are left out at the start, 0 to 1. Higher keeps more of the source's layout; 0.15 for FLUX and 0.33 "
                            "for SD3 are usual. 1 returns the source."),
                io.Float.Input("n_max", default=1.0, min=0.0, max=1.0, step=0.01, round=0.001,
                    tooltip="Share of the steps up to which the source is edited, 0 to 1; the rest is drawn by the sampler from the target prompt alone. "
                            "Lower departs farther from the source."),
                io.Int.Input("n_avg", default=1, min=1, max=16, advanced=True,
                    tooltip="Draws of noise a step whose differences are averaged. More is smoother and as many times slower."),
                io.Boolean.Input("fresh_noise", default=True, advanced=True,
                    tooltip="On: new noise at every step, as published. Off: the NOISE input's at every step, for example RF Invert's."),
            ],
            outputs=[io.Guider.Output(tooltip="For SamplerCustomAdvanced, with the source as its latent and sigmas that end at 0.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, source_positive, source_negative, target_positive, target_negative, cfg_source, cfg_target, n_min, n_max,
                n_avg, fresh_noise):  # fmt: skip
        if n_max < n_min:
            raise ValueError(
                f"n_max {n_max:g} lies before n_min {n_min:g}: the edit would end before it begins. Raise n_max."
            )
        guider = FlowEditGuider(model, Settings(cfg_source, cfg_target, n_min, n_max, n_avg, fresh_noise))
        guider.set_four(source_positive, source_negative, target_positive, target_negative)
        return io.NodeOutput(guider)
