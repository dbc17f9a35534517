from comfy_api.latest import io

from ...methods.control.relactrl import POLICIES
from ...patching.control import when_inputs
from ...patching.relactrl import RelaCtrlSocket, apply
from ...patching.widgets import percents


class ApplyRelactrl(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraApplyRelactrl",
            display_name="Apply RelaCtrl",
            category="Tessera/control",
            description="Controls PixArt-alpha with a picture (edges, for the released weights) through RelaCtrl's light blocks, which stand "
            "only behind those blocks of the model that heed control most.",
            search_aliases=["RelaCtrl", "PixArt ControlNet", "canny PixArt", "relevance-guided control", "TDSM", "RGLC"],
            inputs=[
                io.Model.Input("model", tooltip="PixArt-alpha 1024, from ComfyUI's own loader, in any precision."),
                RelaCtrlSocket.Input("control", tooltip="The control blocks, from Load RelaCtrl."),
                io.Float.Input("strength", default=1.0, min=0.0, max=2.0, step=0.05, round=0.001,
                    tooltip="Factor of what the control blocks add. 0 is the plain model; higher follows the picture more closely."),
                *when_inputs(),
                io.Combo.Input("permutation", options=list(POLICIES),
                    tooltip="When channels and scalars are shuffled anew. fixed: never, the picture is steadiest; per_step: at every step; per_call: at "
                            "every evaluation of the model, as the official code does. The last two take one or two seconds a step at 1024 x 1024."),
                io.Int.Input("perm_seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False,
                    tooltip="Which permutations are drawn. The same seed draws the same ones on every device."),
                io.Boolean.Input("repeat_skip", default=True, advanced=True,
                    tooltip="Adds what a control block gives to every block of the model until the next control block, as the weights were trained. Off "
                            "adds it to the next block alone, which controls less."),
                io.Image.Input("image", optional=True,
                    tooltip="The condition, white edges on black for the canny weights. It is resized to the picture, its middle where the shape is another. "
                            "Needs the VAE."),
                io.Vae.Input("vae", optional=True, tooltip="PixArt-alpha's VAE (that of SD 1.5), for the image."),
                io.Latent.Input("latent", optional=True, tooltip="In place of image and VAE: the condition as a latent of the picture's size."),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL under control. Connect it to the sampler.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, control, strength, start_percent, end_percent, permutation, perm_seed, repeat_skip,
                image=None, vae=None, latent=None):  # fmt: skip
        patched = apply(
            model, control, cls.hidden.unique_id, image, vae, latent, strength=strength,
            percents=percents(start_percent, end_percent), permutation=permutation, seed=perm_seed, repeat=repeat_skip,
        )  # fmt: skip
        return io.NodeOutput(patched)
