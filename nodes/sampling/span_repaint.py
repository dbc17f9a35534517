from comfy_api.latest import io

from ...patching.span_repaint import repaint


class SpanRepaint(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraSpanRepaint",
            display_name="Span Repaint",
            category="Tessera/sampling",
            description="Draws some seconds of a song or clip anew and keeps the rest, or continues it beyond its ends. Gives the latent, noise and sigmas "
            "for SamplerCustomAdvanced; any sampler and any cache works with them.",
            search_aliases=["ACE-Step repaint", "ACE-Step retake", "ACE-Step extend", "audio inpaint", "music inpainting", "outpaint audio",
                            "video span", "temporal inpaint"],
            inputs=[
                io.Latent.Input("latent", tooltip="Sound or a clip: from VAE Encode Audio, VAE Encode or a sampler. Without a noise mask of its own."),
                io.Noise.Input("noise", tooltip="Noise of the source's run where there is one, for example RandomNoise with its seed."),
                io.Sigmas.Input("sigmas", tooltip="The whole schedule, from BasicScheduler."),
                io.Float.Input("start_s", default=0.0, min=-3600.0, max=36000.0, step=0.1, round=0.001,
                    tooltip="Where the span begins, in seconds. Below 0, with extend, the clip grows at its start."),
                io.Float.Input("end_s", default=10.0, min=-3600.0, max=36000.0, step=0.1, round=0.001,
                    tooltip="Where it ends, in seconds. Beyond the clip's end, with extend, the clip grows there."),
                io.Float.Input("variance", default=0.5, min=0.01, max=1.0, step=0.01, round=0.001,
                    tooltip="How new the span becomes, 0 to 1: the share of the steps that are run, and how far its noise is turned away from the given "
                            "one. 1 is drawn from scratch; 0.2 varies details. An extension always counts as 1."),
                io.Boolean.Input("extend", default=False, tooltip="Whether a span beyond the clip makes it longer. Off: it is refused."),
                io.Float.Input("rate", default=0.0, min=0.0, max=1000.0, step=0.01, round=0.0001, advanced=True,
                    tooltip="Latent frames a second. 0 takes that of ACE-Step 1 (10.77) where the latent is one; 25 for ACE-Step 1.5, a clip's frames a "
                            "second divided by 4 for Wan. 1: start_s and end_s count latent frames."),
                io.Int.Input("retake_seed", default=1, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="Seed of the noise that the span is turned towards. Another seed draws it differently."),
            ],
            outputs=[
                io.Latent.Output(tooltip="The clip, grown where asked, with the span as its noise mask."),
                io.Noise.Output(tooltip="The given noise, turned within the span."),
                io.Sigmas.Output(tooltip="The end of the schedule that is run."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, latent, noise, sigmas, start_s, end_s, variance, extend, rate, retake_seed):
        made, turned, cut = repaint(latent, noise, sigmas, start_s, end_s, variance, extend, rate, retake_seed)
        return io.NodeOutput(made, turned, cut)
