import torch
from comfy_api.latest import io


class ClassLabel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraClassLabel",
            display_name="Class Label",
            category="Tessera/loaders",
            description="The class that a class-conditional DiT draws, as CONDITIONING for the sampler. -1 is no class, for the negative input.",
            search_aliases=["DiT", "class conditional", "ImageNet class", "DiT-XL/2"],
            inputs=[
                io.Int.Input("class_label", default=207, min=-1, max=65535,
                    tooltip="Number of the class, for DiT-XL/2 one of ImageNet's 1,000 (207 is a golden retriever). -1: no class, which classifier-free guidance needs on the negative input."),
            ],
            outputs=[io.Conditioning.Output(tooltip="Positive or negative of a KSampler on a MODEL from Load Diffusers Model.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, class_label):
        return io.NodeOutput([[torch.zeros(1, 1, 1), {"class_label": class_label}]])
