from comfy_api.latest import io

from ...methods.digits import codec
from ...patching.compare import compare
from ...patching.sampling import Job


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraCompare",
            display_name="Compare",
            category="Tessera/measure",
            description="Samples the same job with two MODELs, in alternation and warm, and shows what the second one "
            "gains and loses: time, blocks and attention pairs computed, memory, error by step, PSNR and SSIM.",
            search_aliases=["A/B", "benchmark", "speed test", "before after", "PSNR", "SSIM", "timing", "quality"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model_a", tooltip="The reference, usually the plain MODEL."),
                io.Model.Input("model_b", tooltip="The MODEL to judge against it."),
                io.Conditioning.Input("positive", tooltip="Prompt for both."),
                io.Conditioning.Input("negative", tooltip="Negative prompt for both; unused at cfg 1."),
                io.Latent.Input("latent", tooltip="Start latent for both; its size sets the size of the picture."),
                io.Noise.Input("noise", tooltip="Noise for both, for example from RandomNoise."),
                io.Sampler.Input("sampler", tooltip="Sampler for both, for example from KSamplerSelect."),
                io.Sigmas.Input("sigmas", tooltip="Noise schedule for both, for example from BasicScheduler."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="Guidance for both. 1 evaluates the positive prompt alone."),
                io.Int.Input("repeats", default=3, min=1, max=20,
                    tooltip="Timed runs of each MODEL. More give a steadier ratio and take longer."),
                io.Combo.Input("decode", options=["vae", "digits", "none"],
                    tooltip="How latents become pictures for PSNR, SSIM and the image: the connected VAE, the digit models' own codec, or not at all."),
                io.Vae.Input("vae", optional=True, tooltip="Needed for decode = vae."),
            ],
            outputs=[
                io.Latent.Output(display_name="latent_a", tooltip="Result of MODEL a."),
                io.Latent.Output(display_name="latent_b", tooltip="Result of MODEL b."),
                io.Image.Output(display_name="image", tooltip="a, b and their stretched difference, side by side. A black pixel with decode = none."),
                io.Custom("TESSERA_REPORT").Output(display_name="report", tooltip="All numbers, as JSON; also in the run's history."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model_a, model_b, positive, negative, latent, noise, sampler, sigmas, cfg, repeats, decode,
                vae=None):  # fmt: skip
        if decode == "vae" and vae is None:
            raise ValueError("Compare: decode is vae but no VAE is connected. Connect one, or choose digits or none.")
        decoder = {"vae": lambda s: _frames(vae.decode(s)), "digits": _digits, "none": None}[decode]
        job = Job(positive, negative, latent, sampler, sigmas, noise, cfg)
        a, b, images, report = compare((model_a, model_b), job, repeats, decoder)
        return io.NodeOutput({**latent, "samples": a}, {**latent, "samples": b}, images, report,
                             ui={"tessera_report": [report]})  # fmt: skip


def _frames(images):
    return images.reshape(-1, *images.shape[-3:])


def _digits(samples):
    pixels = codec.decode(samples)
    return pixels.reshape(-1, *pixels.shape[-2:], 1).expand(-1, -1, -1, 3)
