from comfy_api.latest import io

from ...patching.control import when_inputs
from ...patching.pose_control import apply


class ApplyPoseControl(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraApplyPoseControl",
            display_name="Apply Pose Control",
            category="Tessera/control",
            description="Lets a video of poses lead the MODEL of Load DynamiCtrl, frame by frame. The pose is computed once a step, for all rows of "
            "the batch together, and never sees the noise.",
            search_aliases=["DynamiCtrl", "pose-adaptive layer norm", "PadaLN", "DWPose", "OpenPose video", "Apply ControlNet",
                            "human animation", "pose driven video"],
            inputs=[
                io.Model.Input("model", tooltip="From Load DynamiCtrl. LoRA, attention and cache nodes may be on it."),
                io.Image.Input("pose_video", optional=True,
                    tooltip="Skeletons drawn on black (DWPose), one picture a frame: as many frames, and of the size, that the video shall have."),
                io.Vae.Input("vae", optional=True, tooltip="CogVideoX's VAE, which encodes pose_video."),
                io.Latent.Input("latent", optional=True, tooltip="The pose as a latent, in place of pose_video and vae."),
                io.Float.Input("strength", default=1.0, min=0.0, max=2.0, step=0.01, round=0.001,
                    tooltip="How strongly the pose is added, 0 to 2. 1 as trained, 0 is the MODEL without a pose bit for bit."),
                *when_inputs(),
                io.Boolean.Input("cache_per_step", default=True, advanced=True,
                    tooltip="On: what the pose adds to every block is kept for the step, so that calls of the same step share it; it takes as much "
                            "memory as that many hidden states. Off: computed again in each call, with little memory. The same video either way."),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with this pose.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, strength, start_percent, end_percent, cache_per_step, pose_video=None, vae=None, latent=None
    ):
        return io.NodeOutput(
            apply(
                model,
                cls.hidden.unique_id,
                pose_video,
                vae,
                latent,
                strength,
                start_percent,
                end_percent,
                cache_per_step,
            )
        )
