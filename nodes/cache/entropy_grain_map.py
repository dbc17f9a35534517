from comfy_api.latest import io

from ...methods.cache.grain_map import grain_map


class EntropyGrainMap(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraEntropyGrainMap",
            display_name="Entropy Grain Map",
            category="Tessera/cache",
            description="Which regions of an image or latent are rich and which are flat, by D2iT's entropy: 1 for the share "
            "of regions with the highest, 0 for the others. Connect the map to Dynamic Grain's mask, or look at it.",
            search_aliases=["D2iT", "information density", "region entropy", "grain map", "detail mask"],
            inputs=[
                io.Image.Input("image", optional=True, tooltip="Pictures [B, H, W, C]. Either these or a latent."),
                io.Latent.Input("latent", optional=True, tooltip="A latent; its values are brought to 0..1 by channel."),
                io.Int.Input("region", default=16, min=1, max=256,
                    tooltip="Side of a square region in pixels of the image, or of the latent. Regions at a border may be smaller."),
                io.Float.Input("fine_ratio", default=0.5, min=0.0, max=1.0, step=0.01, round=0.001,
                    tooltip="Share of the regions that are fine, 0 to 1, the highest entropy first."),
                io.Float.Input("sigma", default=0.01, min=0.001, max=1.0, step=0.001, round=0.0001, advanced=True,
                    tooltip="Width of the density's kernel, for values from 0 to 1. Higher overlooks noise."),
                io.Int.Input("bins", default=64, min=2, max=1024, advanced=True,
                    tooltip="Values at which the density is taken, evenly from 0 to 1. More need less sigma and take longer."),
                io.Combo.Input("output", options=["map", "entropy"], advanced=True,
                    tooltip="map: 1 for fine regions and 0 for others. entropy: the entropy itself, 0 to 1."),
            ],
            outputs=[io.Mask.Output(tooltip="One mask a picture (of a video: a frame), of its size.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, region, fine_ratio, sigma, bins, output, image=None, latent=None):
        if (image is None) == (latent is None):
            raise ValueError("Entropy Grain Map takes an image or a latent: connect one of them.")
        if image is not None:
            pictures = image.movedim(-1, 1)
        else:
            samples = latent["samples"]
            if getattr(samples, "is_nested", False) or samples.ndim not in (4, 5):
                raise ValueError("Entropy Grain Map needs a latent of pictures or one video, [B, C, (T,) H, W].")
            flat = samples.float().flatten(2)
            low, high = (t.view(*t.shape, *[1] * (samples.ndim - 2)) for t in flat.aminmax(dim=2))
            pictures = (samples.float() - low) / (high - low).clamp_min(1e-12)
            pictures = pictures if samples.ndim == 4 else pictures.transpose(1, 2).flatten(0, 1)
        return io.NodeOutput(grain_map(pictures, region, fine_ratio, sigma, bins, output == "entropy"))
