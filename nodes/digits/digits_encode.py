from comfy_api.latest import io

from ...methods.digits import codec


class DigitsEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraDigitsEncode",
            display_name="Digits Encode",
            category="Tessera/digits",
            description="Turns pictures into the LATENT of a digit model, exactly undoing Digits Decode: for partial "
            "denoise, inversion, or a clip to continue.",
            search_aliases=["digits", "VAE Encode", "image to latent", "img2img", "pixel unshuffle", "MNIST", "demo"],
            inputs=[
                io.Image.Input("image", tooltip="Pictures whose sides are multiples of 4 pixels; colours are averaged to grey."),
                io.Combo.Input("kind", options=["image", "video"],
                    tooltip="image: every picture is a latent of the image model. video: pictures are frames of clips for the video model."),
                io.Int.Input("frames", default=8, min=1, max=4096,
                    tooltip="Frames of one clip (the video model was trained on 8). Only for video; the number of pictures must be a multiple of it."),
            ],
            outputs=[io.Latent.Output(tooltip="16 channels, a quarter of the picture's width and height.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, image, kind, frames):
        pixels = image[..., :3].float().mean(-1)
        if kind == "video":
            if len(pixels) % frames:
                raise ValueError(
                    f"Digits Encode cannot cut {len(pixels)} pictures into clips of {frames} frames. "
                    "Set frames to a divisor of the number of pictures."
                )
            pixels = pixels.unflatten(0, (-1, frames))
        return io.NodeOutput({"samples": codec.encode(pixels)})
