from comfy_api.latest import io, ui

from ...methods.video.mask_picture import picture
from ...methods.video.mask_plan import TASKS, frames_of, plan, words
from ...patching.video_mask import masked, video_of


class VideoMaskPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraVideoMaskPlan",
            display_name="Video Mask Plan",
            category="Tessera/video",
            description="Says which frames or places of a video latent are given and which the model makes: continue a clip, lead up to it, fill in "
            "between keyframes, or mend parts, with the frames counted as in the video.",
            search_aliases=["VDT", "noise mask", "Set Latent Noise Mask", "video inpaint", "video prediction", "frame interpolation", "extend video",
                            "keyframes", "first last frame"],
            inputs=[
                io.Latent.Input("latent", tooltip="A video latent. Where frames are given it holds them, for example from VAE Encode; the rest may be anything."),
                io.Combo.Input("task", options=list(TASKS),
                    tooltip="predict: the first frames are given. backward: the last ones. interpolate: every stride-th. frames: those listed. single: one at "
                            "random. random: a random part. spatial: random rectangles, in all frames. unconditional: nothing."),
                io.Int.Input("given", default=8, min=1, max=1 << 16, tooltip="With predict and backward: frames that are given. More hold the clip more firmly."),
                io.Int.Input("stride", default=16, min=1, max=1 << 16,
                    tooltip="With interpolate: frames from one keyframe to the next, from the first frame on. Higher leaves more to the model."),
                io.String.Input("frame_indices", default="",
                    tooltip="With frames: the frames that are given, from 0, with commas. 8:11 is a range, negative ones count from the end: 0, 8:11, -1."),
                io.Float.Input("ratio", default=0.5, min=0.0, max=1.0, step=0.05, round=0.001,
                    tooltip="With random and spatial: share of the latent's frames or places that the model makes, 0 to 1. 0.8 and 0.5 in the paper."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False,
                    tooltip="With single, random and spatial: which ones."),
                io.Int.Input("causal_stride", default=4, min=1, max=32,
                    tooltip="Frames of the video in one latent frame after the first: 4 for Wan, HunyuanVideo and Cosmos, 8 for LTX, 1 for the digits model."),
                io.Int.Input("feather", default=0, min=0, max=64,
                    tooltip="Latent frames, or places with spatial, over which the mask rises next to what is given. 0 is a hard edge; above 0 put "
                            "Differential Diffusion on the MODEL."),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The latent with its noise mask, for the sampler."),
                io.Mask.Output(display_name="mask", tooltip="One mask for each latent frame, 1 where the model makes something."),
                io.Image.Output(display_name="preview", tooltip="The plan: a tile for each latent frame, blue what is given, pale what is made."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, latent, task, given, stride, frame_indices, ratio, seed, causal_stride, feather):
        shape = tuple(video_of(latent, "Video Mask Plan").shape[2:])
        mask = plan(task, shape, given, stride, frame_indices, ratio, seed, causal_stride, feather)
        preview = picture(mask)
        return io.NodeOutput(
            masked(latent, mask[None]), mask, preview,
            ui={**ui.PreviewImage(preview).as_dict(), "tessera_report": [{"kind": "lines", "lines": lines(mask, causal_stride)}]},
        )  # fmt: skip


def lines(mask, causal_stride):
    """For the node's panel."""
    whole = [i for i, frame in enumerate(mask) if not frame.any()]
    return [
        f"{len(mask)} latent frames, {frames_of(len(mask), causal_stride)} frames",
        f"given whole: {words(whole)}",
        f"to be made: {float(mask.mean()):.3f} of all places",
    ]
