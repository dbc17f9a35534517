import folder_paths
from comfy_api.latest import io

from ...patching.linfusion import load


class LoadLinfusion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraLoadLinfusion",
            display_name="Load LinFusion",
            category="Tessera/loaders",
            description="Replaces the self-attention of Stable Diffusion 1.5, 2.1 or XL by LinFusion's trained linear attention: cost then grows with the "
            "number of tokens, not with its square, so pictures of 2K to 16K become possible.",
            search_aliases=["LinFusion", "linear attention", "SDXL high resolution", "16K", "ultra high resolution"],
            inputs=[
                io.Model.Input("model", tooltip="Stable Diffusion 1.5, 2.1 or XL, or any fine-tune of the base that the file was made for."),
                io.Combo.Input("linfusion", options=folder_paths.get_filename_list("model_patches"),
                    tooltip="diffusion_pytorch_model.safetensors of LinFusion in models/model_patches, its config.json in the same folder."),
                io.Int.Input("min_tokens", default=0, min=0, max=1 << 20, advanced=True,
                    tooltip="Tokens of a layer below which it keeps the model's own softmax. 0 is as trained: linear everywhere. Higher leaves the deep layers plain."),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with linear self-attention. Connect it to the sampler or the next node.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, linfusion, min_tokens):
        path = folder_paths.get_full_path_or_raise("model_patches", linfusion)
        return io.NodeOutput(load(model, path, cls.hidden.unique_id, min_tokens))
