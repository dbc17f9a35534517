from comfy_api.latest import io

from ...patching.rope import Stretch, embed

METHODS = {"code": "yarn", "paper": "yarn_paper", "ntk": "ntk", "linear": "linear", "base": "base"}


class ResonanceYarnRope(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraResonanceYarnRope",
            display_name="Resonance YaRN RoPE",
            category="Tessera/attention",
            description="Pictures larger than the model was trained on, without doubled objects: positions along the axes that are too long are "
            "stretched over the trained ones (UltraFlux). Works with stock weights; a size within the trained one changes nothing.",
            search_aliases=["UltraFlux", "YaRN", "NTK", "DyPE", "RoPE scaling", "position interpolation", "high resolution",
                            "extrapolation"],
            inputs=[
                io.Model.Input("model", tooltip="FLUX, FLUX.2, Chroma, Wan, Qwen-Image, Lumina 2, Z-Image, HunyuanVideo or another model with rotary axes."),
                io.Combo.Input("method", options=list(METHODS),
                    tooltip="code: what UltraFlux released (each frequency between linear, ntk and unchanged). paper: YaRN's own ramp. ntk: slow frequencies "
                            "only. linear: all squeezed alike, blurs detail. base: off."),
                io.Boolean.Input("resonance", default=True,
                    tooltip="Rounds each frequency to whole waves over the trained size first, so that the stretched positions repeat no half wave. Off is plain YaRN."),
                io.Int.Input("base_h_tokens", default=64, min=1, max=1024,
                    tooltip="Height the model was trained at, in tokens (16 pixels each on FLUX, Wan and Qwen-Image: 64 is 1,024 pixels). Pictures up to "
                            "this height are left alone; lower stretches more."),
                io.Int.Input("base_w_tokens", default=64, min=1, max=1024,
                    tooltip="Width the model was trained at, in tokens. Pictures up to this width are left alone; lower stretches more."),
                io.Float.Input("beta_fast", default=1.25, min=0.01, max=64.0, step=0.01, advanced=True,
                    tooltip="code: waves over the trained size from which a frequency is treated as ntk. Higher keeps fewer of them so."),
                io.Float.Input("beta_slow", default=0.75, min=0.01, max=64.0, step=0.01, advanced=True,
                    tooltip="code: waves over the trained size below which a frequency is squeezed linearly. Higher squeezes more of them."),
                io.Float.Input("gamma_fast", default=16.0, min=0.01, max=256.0, step=0.1, advanced=True,
                    tooltip="code: waves over the trained size from which a frequency is not changed. Higher changes more of the fast ones."),
                io.Float.Input("gamma_slow", default=2.0, min=0.01, max=256.0, step=0.1, advanced=True,
                    tooltip="code: waves over the trained size below which a frequency changes fully. Higher changes more of them."),
                io.Boolean.Input("mscale", default=True, advanced=True,
                    tooltip="code and paper: lengthens the rotated channels by 0.1 ln(stretch) + 1, which sharpens attention as there are more keys."),
                io.Combo.Input("axes", options=["hw", "thw"], advanced=True,
                    tooltip="Axes that may be stretched: height and width, or also time (videos longer than base_t_tokens)."),
                io.Int.Input("base_t_tokens", default=21, min=1, max=4096, optional=True, advanced=True,
                    tooltip="Length the model was trained at, in latent frames: 21 on Wan (81 frames), 33 on HunyuanVideo. Only for thw; lower stretches more."),
                io.Float.Input("paper_slow", default=1.0, min=0.0, max=255.0, step=0.1, optional=True, advanced=True,
                    tooltip="paper: waves over the trained size below which a frequency is squeezed fully. Higher squeezes more."),
                io.Float.Input("paper_fast", default=32.0, min=0.1, max=256.0, step=0.1, optional=True, advanced=True,
                    tooltip="paper: waves over the trained size from which a frequency is not changed; above paper_slow. Lower keeps more of them."),
                io.Combo.Input("unsupported", options=["error", "warn"], optional=True, advanced=True,
                    tooltip="On a model whose positions are unknown: stop with a sentence, or log it and leave the model as it is."),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with stretched positions. Connect it to the sampler or the next node.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, method, resonance, base_h_tokens, base_w_tokens, beta_fast, beta_slow, gamma_fast, gamma_slow,
                mscale, axes, base_t_tokens=21, paper_slow=1.0, paper_fast=32.0, unsupported="error"):  # fmt: skip
        if paper_fast <= paper_slow:
            raise ValueError(f"paper_fast {paper_fast} must be above paper_slow {paper_slow}.")
        feature = Stretch(
            cls.hidden.unique_id,
            "Resonance YaRN RoPE",
            unsupported=unsupported,
            windows=(base_t_tokens, base_h_tokens, base_w_tokens),
            time=axes == "thw",
            method=METHODS[method],
            options={
                "resonance": resonance,
                "beta": (beta_fast, beta_slow),
                "gamma": (gamma_fast, gamma_slow),
                "turns": (paper_slow, paper_fast),
                "magnify": mscale,
            },
        )
        return io.NodeOutput(embed(model, feature))
