from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ...patching.diffusers_files import choices
from ...patching.dynamictrl import load


def found() -> dict[str, str]:
    """Name -> path of every safetensors file, and of every folder with a config, in models/diffusion_models."""
    files = [n for n in folder_paths.get_filename_list("diffusion_models") if n.endswith(".safetensors")]
    folders = choices(folder_paths.get_folder_paths("diffusion_models"))
    made = {name: str(path) for name, path in folders.items() if Path(path).is_dir()}
    return made | {name: folder_paths.get_full_path_or_raise("diffusion_models", name) for name in files}


class LoadDynamictrl(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraLoadDynamictrl",
            display_name="Load DynamiCtrl",
            category="Tessera/control",
            description="Loads DynamiCtrl's transformer, a CogVideoX that animates a person's picture by a pose video, as a MODEL for KSampler. "
            "Apply Pose Control puts the pose on it.",
            search_aliases=["DynamiCtrl", "CogVideoX", "pose control", "human image animation", "Animate Anyone", "DWPose"],
            inputs=[
                io.Combo.Input("model", options=list(found()),
                    tooltip="The transformer of gulucaptain/DynamiCtrl in models/diffusion_models: a folder with config.json and its safetensors "
                            "files, or one safetensors file."),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL, an image-to-video CogVideoX. Connect it to Apply Pose Control.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model):
        there = found()
        if model not in there:
            raise ValueError(f"{model} is not in models/diffusion_models any more. Choose another.")
        return io.NodeOutput(load(there[model]))
