from comfy_api.latest import io

from ...methods.control.color import METHODS, fixed


class AdainColorFix(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraAdainColorFix",
            display_name="AdaIN Color Fix",
            category="Tessera/control",
            description="Gives a restored picture the colours of the one it was made from: super-resolution models drift in brightness and tint.",
            search_aliases=["color match", "colour fix", "AdaIN", "wavelet color fix", "StableSR color fix", "histogram"],
            inputs=[
                io.Image.Input("image", tooltip="The pictures whose colours are to change."),
                io.Image.Input("reference", tooltip="Where the colours come from, of any size: one picture for all, or one for each."),
                io.Combo.Input("method", options=[*METHODS],
                    tooltip="adain: mean and spread of each channel over the whole picture. wavelet: the coarse colours of every place, so that local "
                            "tints are mended too; the reference must show the same scene."),
            ],
            outputs=[io.Image.Output(tooltip="The pictures in the reference's colours, 0 to 1.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, image, reference, method):
        return io.NodeOutput(fixed(image, reference, method))
