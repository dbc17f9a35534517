from comfy_api.latest import io

from ...patching.control import EasyControlSocket, when_inputs
from ...patching.easycontrol import CACHES, DTYPES
from ...patching.easycontrol_apply import MODES, apply


class ApplyEasycontrol(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraApplyEasycontrol",
            display_name="Apply EasyControl",
            category="Tessera/control",
            description="Puts a condition on FLUX.1: an edge map, a depth map, a pose or a subject that the picture attends to. "
            "The condition is computed once a run and not in every step. Chain one node for each condition.",
            search_aliases=["EasyControl", "ControlNet", "Apply ControlNet", "OminiControl", "subject driven", "canny", "depth",
                            "pose", "Ghibli", "KV cache", "condition LoRA", "reference image"],
            inputs=[
                io.Model.Input("model", tooltip="FLUX.1-dev, or a model fine-tuned from it. Other conditions may be on it already."),
                EasyControlSocket.Input("easycontrol", tooltip="From Load EasyControl or Train EasyControl."),
                io.Image.Input("image", optional=True,
                    tooltip="The condition as a picture: the edge map, depth map, pose or subject. Needs the VAE. Several in a batch "
                            "go to the pictures of the batch in turn."),
                io.Vae.Input("vae", optional=True, tooltip="The VAE of this MODEL, which encodes the image."),
                io.Latent.Input("latent", optional=True,
                    tooltip="The condition as a latent, in place of image and VAE. It is taken in its own size."),
                io.Combo.Input("mode", options=list(MODES), default="auto",
                    tooltip="spatial: the condition is a layout and covers the whole picture, whatever its size. subject: it is an object, "
                            "which keeps its proportions and has no place. auto: what the file says, or its name."),
                io.Int.Input("cond_size", default=512, min=256, max=1024, step=16,
                    tooltip="Side of the square that the image is brought to, pixels. Larger keeps finer lines, and costs memory and time: "
                            "512 is 1,024 tokens, as trained."),
                io.Float.Input("strength", default=1.0, min=0.0, max=2.0, step=0.01, round=0.001,
                    tooltip="Weight of the condition's tokens in attention, 0 to 2. 1 as trained, 0 is the plain MODEL bit for bit."),
                io.Float.Input("lora_scale", default=1.0, min=-2.0, max=2.0, step=0.01, round=0.001, advanced=True,
                    tooltip="Scale of the LoRA on the condition's tokens. 1 as trained; 0 leaves the condition in, without what was "
                            "trained for it. Use strength to weaken it."),
                *when_inputs(),
                io.Combo.Input("cache", options=list(CACHES), advanced=True,
                    tooltip="step_invariant: the condition's keys and values are computed once a run, and are exact. recompute: in every "
                            "step, to compare: the same picture, slower."),
                io.Combo.Input("kv_dtype", options=list(DTYPES), advanced=True,
                    tooltip="How keys and values are held. auto: as the MODEL computes (718 MB for 1,024 tokens of FLUX.1). fp8_e4m3: half "
                            "of that, with a small loss."),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with this condition.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, easycontrol, mode, cond_size, strength, lora_scale, start_percent, end_percent, cache, kv_dtype,
                image=None, vae=None, latent=None):  # fmt: skip
        return io.NodeOutput(
            apply(model, cls.hidden.unique_id, easycontrol, image, vae, latent, mode, cond_size, strength, lora_scale,
                  start_percent, end_percent, cache, kv_dtype)
        )  # fmt: skip
