from comfy_api.latest import io

from ...patching.control import when_inputs
from ...patching.dit4sr import apply
from ...patching.widgets import percents


class ApplyDit4sr(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraApplyDit4sr",
            display_name="Apply DiT4SR",
            category="Tessera/control",
            description="Super-resolution by Stable Diffusion 3.5 medium: the low-resolution picture runs through the model as a second set of tokens "
            "beside the one being drawn. Sizes need not be square.",
            search_aliases=["DiT4SR", "super-resolution", "upscale", "image restoration", "SUPIR", "StableSR", "SeeSR", "tile upscale"],
            inputs=[
                io.Model.Input("model", tooltip="Stable Diffusion 3.5 medium, in any precision; LoRA and quantized weights work."),
                io.Custom("TESSERA_SR_ADAPTER").Input("adapter", tooltip="From Load DiT4SR."),
                io.Image.Input("image", tooltip="The small pictures. A batch is restored picture by picture in one run."),
                io.Vae.Input("vae", tooltip="The VAE of Stable Diffusion 3.5."),
                io.Float.Input("upscale", default=4.0, min=1.0, max=8.0, step=0.25, round=0.001,
                    tooltip="How many times larger each side becomes. Trained for 4. Sides are cut down to multiples of 8 pixels."),
                io.Float.Input("conv_scale", default=1.2, min=0.0, max=2.0, step=0.05, round=0.001, advanced=True,
                    tooltip="Weight of the convolution from the small picture's tokens to the drawn ones. Higher keeps more of the small picture's "
                            "structure; the authors draw with 1.2."),
                io.Combo.Input("key_mode", options=["auto", "fixed_r1", "legacy_v1"], advanced=True,
                    tooltip="Keys of the small picture's tokens: as trained for dit4sr_r1 (fixed_r1), or with the mistake that dit4sr_f and "
                            "dit4sr_q were trained with (legacy_v1). auto: as the file."),
                io.Float.Input("strength", default=1.0, min=0.0, max=2.0, step=0.05, round=0.001,
                    tooltip="Weight of the small picture in attention and convolution. 0 is the plain MODEL bit for bit, 1 as trained; above 1 "
                            "it counts more."),
                *when_inputs(),
            ],
            outputs=[
                io.Model.Output(tooltip="The MODEL that restores this picture. Connect it to the sampler or the next node."),
                io.Latent.Output(tooltip="An empty latent of the target size; sample it with denoise 1."),
            ],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, adapter, image, vae, upscale, conv_scale, key_mode, strength, start_percent, end_percent):
        settings = {"conv_scale": conv_scale, "strength": strength, "percents": percents(start_percent, end_percent)}
        patched, latent = apply(model, adapter, image, vae, upscale, key_mode, node=cls.hidden.unique_id, **settings)
        return io.NodeOutput(patched, {"samples": latent})
