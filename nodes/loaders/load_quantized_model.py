import folder_paths
from comfy_api.latest import io

from ...patching.quant_load import load

FOLDERS = "diffusion_models"
GGUF = "tessera_gguf"  # the same folders, where ComfyUI lists no .gguf files


class LoadQuantizedModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraLoadQuantizedModel",
            display_name="Load Quantized Model",
            category="Tessera/loaders",
            description="Loads a model whose weights stay small in memory: files of Quantize Model, ComfyUI's own formats, GGUF (Q4_0, Q4_K, Q5_K, Q6_K, "
            "Q8_0) and nunchaku's SVDQuant releases. LoRAs on it are exact; caches, attention nodes and offload work as on any MODEL.",
            search_aliases=["Unet Loader (GGUF)", "UnetLoaderGGUF", "GGUF loader", "Nunchaku FLUX DiT Loader", "NunchakuFluxDiTLoader",
                            "SVDQuant", "AWQ", "int4", "fp8", "nvfp4", "quantized loader", "low VRAM"],
            inputs=[
                io.Combo.Input("file", options=files(),
                    tooltip="A .safetensors or .gguf file in models/diffusion_models (or models/unet). Pickled releases (.pt, .ckpt) are converted once with "
                            "python -m scripts.convert_checkpoint."),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL. Quantization Report tells how each layer is stored and computed.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, file):
        if file not in files():
            raise ValueError(
                f"There is no {file!r} in models/diffusion_models. Put it there and refresh the node list."
            )
        kind = GGUF if file.lower().endswith(".gguf") else FOLDERS
        path = folder_paths.get_full_path_or_raise(kind, file)
        return io.NodeOutput(load(path, tuple(folder_paths.get_folder_paths(FOLDERS))))


def files() -> list[str]:
    """Names of all files that may be quantized models, sorted."""
    folder_paths.folder_names_and_paths[GGUF] = (folder_paths.get_folder_paths(FOLDERS), {".gguf"})
    return sorted({*folder_paths.get_filename_list(FOLDERS), *folder_paths.get_filename_list(GGUF)}, key=str.lower)
