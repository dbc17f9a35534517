from comfy_api.latest import io

from ...methods.attention.local_window import BASE_TOKENS, COUNTS, LocalWindow
from ...patching.attention import AttentionFeature
from ...patching.rope import Theta, embed
from ...patching.run import attach
from ...patching.widgets import where, where_inputs


class LocalWindowAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraLocalWindowAttention",
            display_name="Local Window Attention",
            category="Tessera/attention",
            description="Image tokens attend to the text and to image tokens within a radius, instead of to all. Large "
            "pictures and videos gain most. Works with stock weights. A radius that spans the picture (and a temporal_radius that spans the clip) changes "
            "nothing, as long as nothing else is turned on.",
            search_aliases=["CLEAR", "sliding window", "neighborhood attention", "NATTEN", "sparse attention", "STA",
                            "radial attention"],
            inputs=[
                io.Model.Input("model", tooltip="A Diffusion Transformer whose token layout is known."),
                io.Int.Input("radius", default=16, min=1, max=512,
                    tooltip="Reach in tokens (16 pixels each on FLUX, Wan and SD3), strictly less than this far. Higher is closer to the plain picture and slower."),
                io.Combo.Input("metric", options=["circle", "square"],
                    tooltip="Shape of the window: a disc of this radius, or a square of this half side."),
                io.Int.Input("temporal_radius", default=2, min=0, max=512,
                    tooltip="Video: reach in latent frames before and after the token's own. 0 is the same frame only; higher keeps motion and is slower."),
                *where_inputs(),
                io.Int.Input("down_factor", default=4, min=0, max=32, optional=True,
                    tooltip="Side in tokens of the patches whose mean every image token sees too, wherever they are: what keeps a "
                            "small radius from repeating objects. 4 adds a sixteenth of the image's tokens as keys; lower sees the "
                            "distance more sharply and is slower. 0 or 1 is off. Nothing is pooled where the window spans the picture, or a patch the frame."),
                io.Combo.Input("pooled_counts_as", options=list(COUNTS), optional=True, advanced=True,
                    tooltip="How much a patch of down_factor weighs beside single tokens: as one token, which CLEAR's weights are trained for, or as "
                            "all the tokens it stands for, which keeps stock weights much closer to the plain picture. auto looks at the weights."),
                io.Boolean.Input("proportional", default=False, optional=True, advanced=True,
                    tooltip="Multiplies the softmax scale by the root of log(keys) / log(base_tokens): CLEAR's correction for pictures larger than "
                            "the model was trained on. Sharper attention above base_tokens, blunter below."),
                io.Int.Input("base_tokens", default=BASE_TOKENS, min=2, max=1 << 20, optional=True, advanced=True,
                    tooltip="Tokens, text included, that the model was trained with: 4,608 on FLUX (64 x 64 and 512 of text). Only for proportional; higher "
                            "is a blunter softmax."),
                io.Float.Input("ntk_factor", default=1.0, min=1.0, max=100.0, step=0.1, round=0.001, optional=True, advanced=True,
                    tooltip="Multiplies the base of the rotary positions, whatever the size: CLEAR takes 10 for pictures of 2,048 pixels and more. Higher "
                            "spreads positions less. 1 is off. Resonance YaRN RoPE does it by size, and instead of this."),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with local attention. Connect it to the sampler or the next node.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, radius, metric, temporal_radius, down_factor=4, pooled_counts_as="auto", proportional=False,
                base_tokens=BASE_TOKENS, ntk_factor=1.0, **shared):  # fmt: skip
        feature = AttentionFeature(
            cls.hidden.unique_id,
            "Local Window Attention",
            method=LocalWindow(
                radius, metric, temporal_radius, down_factor, pooled_counts_as, proportional, base_tokens
            ),
            **where(**shared),
        )
        if ntk_factor != 1:
            name, unsupported = "Local Window Attention, ntk_factor", shared["unsupported"]
            model = embed(model, Theta(None, name, unsupported=unsupported, factor=ntk_factor))
        return io.NodeOutput(attach(model, feature))
