from comfy_api.latest import io

from ...methods.digits import codec


class DigitsDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraDigitsDecode",
            display_name="Digits Decode",
            category="Tessera/digits",
            description="Turns the LATENT of a digit model into pictures, or into the frames of its clips. A fixed, "
            "lossless rearrangement that has no weights: one latent cell is 4x4 pixels.",
            search_aliases=["digits", "VAE Decode", "latent to image", "pixel shuffle", "MNIST", "frames", "demo"],
            inputs=[
                io.Latent.Input("samples", tooltip="Latent of a digit model, after the sampler: 16 channels, 4-D for "
                                                   "pictures, 5-D for clips."),
            ],
            outputs=[io.Image.Output(tooltip="Grey pictures, 4 times the size of the latent; for clips every frame, clip after clip.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, samples):
        latent = samples["samples"]
        if latent.is_nested:
            raise ValueError(
                f"Digits Decode takes one latent, got {len(latent.unbind())} nested in one LATENT (video with audio?). "
                "Connect the latent of a digit model."
            )
        pixels = codec.decode(latent.float())
        return io.NodeOutput(pixels.reshape(-1, *pixels.shape[-2:], 1).repeat(1, 1, 1, 3))
