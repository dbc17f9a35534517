from comfy_api.latest import io, ui

from ...methods.video.mask_picture import picture
from ...methods.video.mask_plan import OPERATIONS, compose
from ...patching.video_mask import mask_of, masked

NAME = "Video Mask Compose"


class VideoMaskCompose(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraVideoMaskCompose",
            display_name="Video Mask Compose",
            category="Tessera/video",
            description="Makes one noise mask of two of the same video: made where either is, where both are, or where one is and the other is not.",
            search_aliases=["VDT", "MaskComposite", "combine masks", "noise mask", "video inpaint"],
            inputs=[
                io.Latent.Input("a", tooltip="A video latent from Video Mask Plan. Its content goes on; without a mask all of it is to be made."),
                io.Latent.Input("b", tooltip="Another mask on a latent of the same frames and size. Its content is not used."),
                io.Combo.Input("operation", options=list(OPERATIONS),
                    tooltip="The model makes: union, what either mask makes; intersection, what both make; difference, what a makes and b does not; "
                            "either_one, what exactly one makes."),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The latent of a with the composed mask, for the sampler."),
                io.Mask.Output(display_name="mask", tooltip="One mask for each latent frame, 1 where the model makes something."),
                io.Image.Output(display_name="preview", tooltip="A tile for each latent frame, blue what is given, pale what is made."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, a, b, operation):
        one, two = mask_of(a, NAME), mask_of(b, NAME)
        if one.shape[1:] != two.shape[1:] or (one.shape[0] != two.shape[0] and 1 not in (one.shape[0], two.shape[0])):
            raise ValueError(f"{NAME}: a's mask {[*one.shape]} and b's {[*two.shape]} differ; plan both on one latent.")
        mask = compose(one, two, operation)
        if not mask.any():
            raise ValueError(f"{NAME}: {operation} leaves nothing to make; take another operation, or swap a and b.")
        preview = picture(mask[0])
        return io.NodeOutput(masked(a, mask), mask[0], preview, ui=ui.PreviewImage(preview).as_dict())
