import folder_paths
from comfy_api.latest import io

from ...methods.control.dit4sr import VARIANTS, read
from ...patching.dit4sr import Adapter

SrAdapter = io.Custom("TESSERA_SR_ADAPTER")


class LoadDit4sr(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraLoadDit4sr",
            display_name="Load DiT4SR",
            category="Tessera/control",
            description="Loads DiT4SR's super-resolution layers for Stable Diffusion 3.5 medium. Of a released file only these are kept, an "
            "eighth of it; Apply DiT4SR puts them on the MODEL.",
            search_aliases=["DiT4SR", "super-resolution", "dit4sr_q", "dit4sr_f", "dit4sr_r1", "image restoration loader"],
            inputs=[
                io.Combo.Input("file", options=folder_paths.get_filename_list("controlnet"),
                    tooltip="diffusion_pytorch_model.safetensors of acceptee/DiT4SR in models/controlnet/dit4sr_q, dit4sr_f or dit4sr_r1, or a "
                            "file of its control tensors alone."),
                io.Combo.Input("variant", options=["auto", *VARIANTS], advanced=True,
                    tooltip="How the file was trained: v1 for dit4sr_f and dit4sr_q, r1 for dit4sr_r1. auto: from the names of the file and its "
                            "folder, or its metadata."),
            ],
            outputs=[SrAdapter.Output(display_name="adapter", tooltip="The layers, for Apply DiT4SR.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, file, variant):
        path = folder_paths.get_full_path_or_raise("controlnet", file)
        return io.NodeOutput(Adapter.of(read(path, variant)))
