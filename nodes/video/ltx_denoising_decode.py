from comfy_api.latest import io

from ...patching.ltx_decode import NOISES, Asked, conditioned, decode

PLAIN = "This VAE takes no timestep, so timestep, noise and seed changed nothing: it was decoded as VAE Decode does."


class LtxDenoisingDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraLtxDenoisingDecode",
            display_name="LTX Denoising Decode",
            category="Tessera/video",
            description="Decodes LTX-Video's latent with the last denoising step in your hands: how much noise the decoder takes away, and which. The same "
            "seed gives the same frames; ComfyUI's own decode differs each time.",
            search_aliases=["LTXTimestepVAEDecode", "LTX-Video", "LTXV decode", "VAE decode", "decode timestep", "decode noise scale", "seeded decode", "tiled decode"],
            inputs=[
                io.Latent.Input("samples", tooltip="Latent of LTX-Video; of video with sound the video is decoded. Where it has a noise mask, what was given gets no noise."),
                io.Vae.Input("vae", tooltip="VAE of LTX-Video, 0.9.1 or newer: those decoders take noise away. Others of LTX are decoded plainly."),
                io.Float.Input("decode_timestep", default=0.05, min=0.0, max=1.0, step=0.005, round=0.001,
                    tooltip="How much noise the decoder thinks is left, 0 to 1. Higher smooths and invents more, lower keeps closer to the latent."),
                io.Float.Input("decode_noise_scale", default=0.025, min=0.0, max=1.0, step=0.005, round=0.001,
                    tooltip="Noise mixed into the latent before, 0 to 1. More gives finer, less faithful texture; 0 adds none, and the seed has no say."),
                io.Boolean.Input("link_scale_to_timestep", default=False, tooltip="The noise is as much as decode_timestep says; decode_noise_scale is not used."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False,
                    tooltip="Seed of the noise. The same one gives the same frames, tiled or whole."),
                io.Combo.Input("noise", options=list(NOISES),
                    tooltip="each_frame: fresh noise in every latent frame, as trained. same_in_all: one noise for all, so that still parts flicker less."),
                io.Int.Input("tile_size", default=0, min=0, max=4096, step=32,
                    tooltip="Side of a tile in pixels, decoded on its own to save memory; 0 decodes the frame whole. Smaller takes less memory and shows more seams."),
                io.Int.Input("overlap", default=64, min=0, max=4096, step=32,
                    tooltip="With tile_size: pixels that tiles share and blend over, at most a quarter of a tile. More hides seams and takes longer."),
                io.Int.Input("temporal_tile", default=0, min=0, max=4096, step=8,
                    tooltip="Frames decoded at a time, to save memory; 0 takes all. Fewer take less memory and may show as a jump."),
                io.Int.Input("temporal_overlap", default=16, min=8, max=4096, step=8, advanced=True,
                    tooltip="With temporal_tile: frames that neighbouring parts share and blend over, at most half of a part."),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The frames; several clips follow each other.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, samples, vae, decode_timestep, decode_noise_scale, link_scale_to_timestep, seed, noise, tile_size, overlap,
                temporal_tile, temporal_overlap):  # fmt: skip
        scale = decode_timestep if link_scale_to_timestep else decode_noise_scale
        asked = Asked(decode_timestep, scale, seed, noise, tile_size, overlap, temporal_tile, temporal_overlap)
        frames = decode(samples, vae, asked)
        plain = {} if conditioned(vae) else {"ui": {"tessera_report": [{"kind": "lines", "lines": [PLAIN]}]}}
        return io.NodeOutput(frames, **plain)
