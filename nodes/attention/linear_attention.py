import folder_paths
from comfy_api.latest import io

from ...methods.attention.graft import load
from ...methods.attention.linear import FEATURE_MAPS, NORMALIZERS, from_graft
from ...methods.attention.linear import LinearAttention as Method
from ...patching.attention import AttentionFeature
from ...patching.run import attach
from ...patching.widgets import where, where_inputs

NO_FILE = "none"


class LinearAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraLinearAttention",
            display_name="Linear Attention",
            category="Tessera/attention",
            description="Attention whose cost grows with the number of tokens, not with its square. Needs trained weights (a graft) to give good pictures; "
            "without them a few blocks of a stock model bear it at most.",
            search_aliases=["LiT", "SANA", "ReLU linear attention", "LinFusion", "TransNormer", "NormAttention", "Hedgehog", "LinVideo", "ACE-Step", "graft"],
            inputs=[
                io.Model.Input("model", tooltip="A Diffusion Transformer whose token layout is known."),
                io.Combo.Input("graft", options=[NO_FILE, *folder_paths.get_filename_list("model_patches")],
                    tooltip="File in models/model_patches with the weights that were trained for this operator. Its own settings replace those below. none: the bare operator."),
                io.Boolean.Input("allow_untrained", default=False,
                    tooltip="Without a graft, act in all blocks of a stock model all the same. The picture is noise; for measuring only."),
                io.Combo.Input("feature_map", options=list(FEATURE_MAPS),
                    tooltip="What stands for the exponential: relu (LiT, SANA), elu1 = elu + 1 (LinFusion), softmax over the channels (SLA), hedgehog (LinVideo), identity."),
                io.Combo.Input("normalizer", options=list(NORMALIZERS),
                    tooltip="What each row is divided by: the sum of its weights, the same with eps against their mean (LinFusion), its root mean square per head or over all heads (TransNormer), or nothing."),
                io.Float.Input("eps", default=1e-6, min=0.0, max=1e-2, step=1e-7, round=1e-9, advanced=True,
                    tooltip="Added to the divisor. Higher damps rows whose weights are all small; LinFusion uses 0.0001, SANA 1e-15."),
                io.Int.Input("heads", default=0, min=0, max=64, advanced=True,
                    tooltip="Heads that the features are split into; 0 is the model's own number. Fewer are wider: more expressive and slower (LiT uses 2 to 4)."),
                io.Combo.Input("rope", options=["rotated", "dual"], advanced=True,
                    tooltip="rotated: queries and keys as the model hands them over, after RoPE. dual (SANA-Video): features before RoPE, rotated for the numerator alone; "
                            "on models that tell their RoPE (FLUX, Chroma, Qwen-Image)."),
                io.Combo.Input("text", options=["dense", "linear"], advanced=True,
                    tooltip="Rows of the text in joint attention: keep softmax over all tokens, which costs little, or become linear too."),
                *where_inputs(),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with linear attention. Connect it to the sampler or the next node.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, graft, allow_untrained, feature_map, normalizer, eps, heads, rope, text, **shared):
        method = Method(feature_map, normalizer, eps, heads, rope, text, allow_untrained)
        if graft != NO_FILE:
            method = from_graft(method, load(folder_paths.get_full_path_or_raise("model_patches", graft)))
        feature = AttentionFeature(cls.hidden.unique_id, "Linear Attention", method=method, **where(**shared))
        return io.NodeOutput(attach(model, feature))
