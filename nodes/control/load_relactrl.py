import folder_paths
from comfy_api.latest import io

from ...patching.relactrl import RelaCtrlSocket, load


class LoadRelactrl(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraLoadRelactrl",
            display_name="Load RelaCtrl",
            category="Tessera/control",
            description="Loads RelaCtrl's control blocks for PixArt-alpha: eleven light ones of 46 million parameters together, where a "
            "ControlNet for it has half of the model again. Checks every tensor of the file.",
            search_aliases=["RelaCtrl", "PixArt ControlNet", "relevance-guided control", "relactrl_pixart_canny_1024"],
            inputs=[
                io.Combo.Input("file", options=folder_paths.get_filename_list("controlnet"),
                    tooltip="A file of qihoo360/RelaCtrl in models/controlnet, converted to safetensors with "
                            "python -m scripts.convert_checkpoint. Base weights inside are left out."),
            ],
            outputs=[RelaCtrlSocket.Output(display_name="control", tooltip="The control blocks. Connect them to Apply RelaCtrl.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, file):
        return io.NodeOutput(load(folder_paths.get_full_path_or_raise("controlnet", file)))
