import folder_paths
from comfy_api.latest import io

from ...patching.diffusers_files import choices
from ...patching.diffusers_load import load
from ...patching.layers import DTYPES

FOLDERS = ("diffusers", "diffusion_models")


def roots():
    return [root for folder in FOLDERS for root in folder_paths.get_folder_paths(folder)]


class LoadDiffusersModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraLoadDiffusersModel",
            display_name="Load Diffusers Model",
            category="Tessera/loaders",
            description="Runs a transformer of diffusers, by diffusers' own code, as a MODEL for KSampler: DiT, PixArt, Sana, Sana Video, CogVideoX, Latte, "
            "LTX-Video, Flux, Stable Diffusion 3 and Wan. Attention and cache nodes act on it.",
            search_aliases=["diffusers", "DiT-XL/2", "Sana", "Latte", "transformer folder", "safetensors shards", "config.json"],
            inputs=[
                io.Combo.Input("model", options=list(choices(roots())),
                    tooltip="A folder with config.json and safetensors files, or a safetensors file with a JSON of its name, in models/diffusers or models/diffusion_models. "
                            "Keep scheduler and vae of a pipeline beside transformer: their configs tell noise levels and latent scale."),
                io.Combo.Input("weight_dtype", options=list(DTYPES), default="default", advanced=True,
                    tooltip="What the weights are held in. default: as the file and this machine allow."),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL. Connect it to attention and cache nodes or to the sampler.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, weight_dtype):
        found = choices(roots())
        if model not in found:
            raise ValueError(
                f"{model} is in neither models/diffusers nor models/diffusion_models any more. Choose another."
            )
        return io.NodeOutput(load(str(found[model]), weight_dtype))
