import folder_paths
from comfy_api.latest import io

from ...methods.attention.sparse_linear import SparseLinear
from ...methods.attention.sparse_linear_weights import read
from ...patching.sparse_linear import block_size, patch, sparse_inputs
from ...patching.widgets import where, where_inputs

CHECKPOINTS = "diffusion_models/"
SUFFIXES = (".safetensors", ".sft")


class SparseLinearAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraSparseLinearAttention",
            display_name="Sparse-Linear Attention",
            category="Tessera/attention",
            description="Each block of image tokens attends to the share of key blocks that matter most, chosen anew in "
            "every call; with weights, linear attention stands for the rest. Large pictures and videos gain most. Works "
            "with stock weights. topk 1 changes nothing.",
            search_aliases=["SLA", "TurboDiffusion", "TurboWan", "SpargeAttn", "sparse attention", "top-k attention",
                            "block sparse", "VSA", "MoBA"],
            inputs=[
                io.Model.Input("model", tooltip="A Diffusion Transformer whose token layout is known."),
                *sparse_inputs(),
                io.Combo.Input("weights", options=["none", *files()],
                    tooltip="Projections of the linear branch: a file of Calibrate Sparse-Linear Attention (models/model_patches), or a "
                            "TurboWan checkpoint. none: the sparse part alone."),
                io.Boolean.Input("linear_branch", default=True, advanced=True,
                    tooltip="Off leaves out the linear branch of the weights: faster, and further from dense attention. Without weights "
                            "it is off anyway."),
                *where_inputs(),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with sparse attention. Connect it to the sampler or the next node.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, topk, variant, negligible, feature_map, block_q, block_k, keep_own, order, weights,
                linear_branch, **shared):  # fmt: skip
        projections = None if weights == "none" or not linear_branch else read(path_of(weights))
        numbers = block_size(block_q), block_size(block_k)
        method = SparseLinear(topk, variant, negligible, feature_map, *numbers, keep_own, order, projections)
        return io.NodeOutput(patch(model, cls.hidden.unique_id, method, where(**shared)))


def files():
    """Names for the combo: projection files, then checkpoints, which may hold projections too."""
    kinds = (("model_patches", ""), ("diffusion_models", CHECKPOINTS))
    return [mark + name for folder, mark in kinds for name in folder_paths.get_filename_list(folder)
            if name.lower().endswith(SUFFIXES)]  # fmt: skip


def path_of(name):
    if name.startswith(CHECKPOINTS):
        return folder_paths.get_full_path_or_raise("diffusion_models", name[len(CHECKPOINTS) :])
    return folder_paths.get_full_path_or_raise("model_patches", name)
