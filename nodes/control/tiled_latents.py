from comfy_api.latest import io

from ...patching.run import attach
from ...patching.tiles import TileFeature


class TiledLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraTiledLatents",
            display_name="Tiled Latents",
            category="Tessera/control",
            description="Draws large pictures as overlapping tiles, blended at every step: the MODEL never sees more than one tile, and memory stays "
            "that of a tile. Made for super-resolution with Apply DiT4SR.",
            search_aliases=["Tiled Latent Guider", "tiled diffusion", "MultiDiffusion", "Mixture of Diffusers", "tiled upscale", "StableSR tiles"],
            inputs=[
                io.Model.Input("model", tooltip="Any MODEL that samples pictures or clips. A clip is cut in height and width only."),
                io.Int.Input("tile", default=64, min=8, max=1024, step=8,
                    tooltip="Side of a tile in places of the latent, 8 pixels each on most models: 64 is 512 pixels. Larger is more coherent and takes "
                            "more memory; the size that the adapter was trained on is best."),
                io.Int.Input("overlap", default=24, min=0, max=512, step=1,
                    tooltip="Places that neighbouring tiles share, blended by a Gaussian. More hides seams better and is slower."),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL that draws in tiles. Connect it to the sampler or the next node.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, tile, overlap):
        if not 0 <= overlap < tile:
            raise ValueError(f"overlap {overlap} must be smaller than tile {tile}: neighbouring tiles share that much.")
        return io.NodeOutput(attach(model, TileFeature(cls.hidden.unique_id, tile=tile, overlap=overlap)))
