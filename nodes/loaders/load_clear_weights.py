import folder_paths
from comfy_api.latest import io

from ...patching.clear_weights import load


class LoadClearWeights(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraLoadClearWeights",
            display_name="Load CLEAR Weights",
            category="Tessera/loaders",
            description="Puts CLEAR's attention weights on FLUX.1-dev: trained so that Local Window Attention, which has to follow, "
            "draws with a small radius what the plain model draws with all tokens.",
            search_aliases=["CLEAR", "conv-like linearization", "clear_local_8_down_4", "local attention weights",
                            "linear attention FLUX"],
            inputs=[
                io.Model.Input("model", tooltip="FLUX.1-dev. Its image projections (q, k, v and output) are replaced; LoRA add to the new ones."),
                io.Combo.Input("file", options=folder_paths.get_filename_list("loras"),
                    tooltip="A file of Huage001/CLEAR in models/loras, such as clear_local_8_down_4.safetensors: the numbers in its name are "
                            "the radius and the down_factor that Local Window Attention should have."),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with CLEAR's weights. Connect it to Local Window Attention.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, file):
        path = folder_paths.get_full_path_or_raise("loras", file)
        return io.NodeOutput(load(model, path, cls.hidden.unique_id))
