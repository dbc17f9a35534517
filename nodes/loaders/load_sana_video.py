import folder_paths
from comfy_api.latest import io

from ...patching.sana_video_load import WEIGHT_DTYPES, load, models

FOLDERS = ("diffusers", "diffusion_models")


def found():
    roots = [root for folder in FOLDERS for root in folder_paths.get_folder_paths(folder)]
    return models(roots, folder_paths.get_folder_paths("diffusion_models"))


class LoadSanaVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraLoadSanaVideo",
            display_name="Load SANA-Video",
            category="Tessera/loaders",
            description="Loads SANA-Video, a video model whose self-attention is linear, as a MODEL for KSampler and for Block Linear Video Sampler.",
            search_aliases=["SANA", "SANA-Video", "LongSANA", "LongLive", "linear DiT", "Block Linear Diffusion Transformer"],
            inputs=[
                io.Combo.Input("model", options=list(found()),
                    tooltip="The transformer folder of a release for diffusers, in models/diffusers or models/diffusion_models, or one safetensors file."),
                io.Combo.Input("weight_dtype", options=list(WEIGHT_DTYPES), default="default", advanced=True,
                    tooltip="What the weights are held in. fp8_e4m3fn takes half the memory of bfloat16 and changes the video a little. default: as the file and this machine allow."),
                io.Boolean.Input("fp32_linear_attn", default=True, advanced=True,
                    tooltip="On: queries, keys and values of the linear attention in fp32, as the model was trained. Off: in bfloat16 with sums in fp32, which takes half the memory for them and is faster on tensor cores."),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL. Connect it to LoRA and cache nodes or to the sampler.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, weight_dtype, fp32_linear_attn):
        known = found()
        if model not in known:
            raise ValueError(
                f"{model} is in neither models/diffusers nor models/diffusion_models any more. Choose another."
            )
        return io.NodeOutput(load(str(known[model]), weight_dtype, fp32_linear_attn))
