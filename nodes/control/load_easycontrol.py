from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ...methods.control.easycontrol import read
from ...methods.weight_files import read_weights
from ...patching.control import EasyControlSocket

REMEDY = "download it again from Xiaojiu-Z/EasyControl, or train it again"


class LoadEasycontrol(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraLoadEasycontrol",
            display_name="Load EasyControl",
            category="Tessera/control",
            description="Loads the LoRA of one EasyControl condition (canny, depth, pose, subject, ...) for Apply EasyControl.",
            search_aliases=["EasyControl", "Ghibli", "Load ControlNet Model", "condition LoRA", "OminiControl", "subject control"],
            inputs=[
                io.Combo.Input("file", options=folder_paths.get_filename_list("controlnet"),
                    tooltip="A file of Xiaojiu-Z/EasyControl, or of Train EasyControl, in models/controlnet."),
                io.Int.Input("condition", default=0, min=0, max=99, advanced=True,
                    tooltip="Number of the condition in the file, from 0. The released files hold one."),
            ],
            outputs=[EasyControlSocket.Output(display_name="easycontrol", tooltip="For Apply EasyControl.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, file, condition):
        path = folder_paths.get_full_path_or_raise("controlnet", file)
        tensors, metadata = read_weights(path, REMEDY)
        return io.NodeOutput(read(tensors, Path(path).name, metadata, condition))
