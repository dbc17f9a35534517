from comfy_api.latest import io

from ...methods.attention.log_linear_sparse import ORDERS, LogLinearSparse
from ...patching.attention import AttentionFeature
from ...patching.run import attach
from ...patching.widgets import where, where_inputs

LEVELS = {"auto": 0, "1": 1, "2": 2, "3": 3}


class LogLinearSparseAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraLogLinearSparseAttention",
            display_name="Log-Linear Sparse Attention",
            category="Tessera/attention",
            description="Each patch of the picture attends to the patches that matter to it, token by token, and to all "
            "the rest as averages, so that nothing is out of sight. Works with stock weights. A density of 1 changes nothing.",
            search_aliases=["LLSA", "log-linear", "hierarchical attention", "top-k", "sparse attention", "block sparse",
                            "VSA", "MoBA", "native sparse attention", "NSA", "VMoBA", "BSA"],
            inputs=[
                io.Model.Input("model", tooltip="A Diffusion Transformer whose token layout is known."),
                io.Float.Input("density", default=0.25, min=0.0, max=1.0, step=0.01, round=0.001,
                    tooltip="Share of the patches that each patch sees token by token, 0 to 1. Higher is closer to the plain picture and slower. 1 is plain attention."),
                io.Int.Input("topk", default=0, min=0, max=4096,
                    tooltip="So many patches instead of a share, for weights trained that way (LLSA: 8): cost then grows as N log N. Higher is closer to the plain picture and slower. 0: density decides."),
                io.Combo.Input("levels", options=list(LEVELS),
                    tooltip="Coarser and coarser averages of the rest. 1 averages single patches and is closest; each further level is cheaper on very many tokens. auto: as the paper takes for the size, fewer where density makes the coarse ones idle."),
                io.Combo.Input("block", options=["16", "32", "64"],
                    tooltip="Tokens of a patch. Smaller picks more precisely, larger is quicker to pick."),
                io.Boolean.Input("enrich", default=True,
                    tooltip="See what was not picked as averages. Off: it is not seen at all, as in plain top-k."),
                io.Boolean.Input("reweight", default=True, advanced=True,
                    tooltip="An average of n tokens counts n times. Off: it counts as one token, and the rest of the picture fades."),
                io.Boolean.Input("exclude_selected", default=True, advanced=True,
                    tooltip="Leave picked patches out of the averages, so that nothing counts twice. Off is the paper's form, for weights trained with it."),
                io.Combo.Input("reorder", options=list(ORDERS), advanced=True,
                    tooltip="What a patch is. auto: a run along a row on a picture whose rows fit into a patch, else a tile that reaches through frames too. The others: a tile that reaches through frames too, a tile of one frame (the same on a picture), a run of the Z curve, or a run along a row. Any size is cut without gaps."),
                *where_inputs(),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with sparse attention. Connect it to the sampler or the next node.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, density, topk, levels, block, enrich, reweight, exclude_selected, reorder, **shared):
        feature = AttentionFeature(
            cls.hidden.unique_id,
            "Log-Linear Sparse Attention",
            method=LogLinearSparse(
                density, topk, LEVELS[levels], int(block), enrich, reweight, exclude_selected, reorder
            ),
            **where(**shared),
        )
        return io.NodeOutput(attach(model, feature))
