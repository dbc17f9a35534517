from comfy_api.latest import io

from ...methods.cache.tokens import Share
from ...patching.cache_widgets import profiled, where_cached
from ...patching.dynamic_tokens import DynamicTokens as Feature
from ...patching.run import attach
from ...patching.widgets import parse_blocks, percents


class DynamicTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraDynamicTokens",
            display_name="Dynamic Tokens",
            category="Tessera/cache",
            description="Tokens that a block's MLP hardly changes skip it for some evaluations; attention stays whole. "
            "Works with stock weights: the last full evaluation decides, where the paper trains a router.",
            search_aliases=["DyDiT", "DyDiT++", "DyFLUX", "dynamic diffusion transformer", "spatial-wise dynamic token",
                            "SDT", "token skipping", "ToCa", "token-wise caching", "token pruning", "speed up"],
            inputs=[
                io.Model.Input("model", tooltip="A Diffusion Transformer with an MLP for each token."),
                io.Float.Input("quantile", default=0.3, min=0.0, max=0.9, step=0.01, round=0.001,
                    tooltip="Share of the image tokens that skip the MLP, 0 to 0.9: those to which it added least. Higher is faster "
                            "and less exact. 0 is off."),
                io.Int.Input("refresh_every", default=4, min=1, max=20,
                    tooltip="One full evaluation in this many chooses anew. Higher skips more and follows the picture later. 1 is off."),
                io.Combo.Input("fill", options=["reuse", "zero"],
                    tooltip="What a skipping token gets: its MLP output of the last full evaluation (holds memory, closer), "
                            "or nothing (as the paper)."),
                io.Float.Input("min_active", default=0.1, min=0.0, max=1.0, step=0.01, round=0.001, advanced=True,
                    tooltip="Share of the tokens that is computed whatever quantile says, 0 to 1. 1 is off."),
                io.Combo.Input("tokens", options=["image", "all"], advanced=True,
                    tooltip="Who may skip: image tokens, or those of the text too."),
                io.String.Input("blocks", default="all", advanced=True,
                    tooltip='Transformer blocks that it acts on, counted from 0 over the whole stack: "all", or like "2-18,25". '
                            "Fewer blocks are slower and closer to the plain picture."),
                io.Float.Input("start_percent", default=0.2, min=0.0, max=1.0, step=0.01, round=0.001, advanced=True,
                    tooltip="Part of the noise schedule from which tokens may skip, 0 to 1. Higher leaves more of the start exact."),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, round=0.001, advanced=True,
                    tooltip="Part of the noise schedule up to which tokens may skip, 0 to 1. Lower leaves more of the end exact."),
                io.Combo.Input("cache_device", options=["gpu", "cpu"], advanced=True,
                    tooltip="Where outputs to reuse are held. cpu saves VRAM and costs a transfer in every block."),
                io.Combo.Input("cache_dtype", options=["model", "float32", "bfloat16"], advanced=True,
                    tooltip="Precision of outputs to reuse. model keeps the model's own; bfloat16 halves the memory of fp32."),
                io.Combo.Input("unsupported", options=["error", "warn"], advanced=True,
                    tooltip="On a model that cannot be served: stop with a sentence, or log it and leave the model as it is."),
                *(widget for widget in where_cached() if widget.id == "profile"),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL whose MLPs skip tokens. Connect it to the sampler.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, **inputs):
        inputs = profiled("Dynamic Tokens", inputs)
        feature = Feature(
            cls.hidden.unique_id,
            share=Share(inputs.pop("quantile"), inputs.pop("min_active")),
            blocks=parse_blocks(inputs.pop("blocks")),
            percents=percents(inputs.pop("start_percent"), inputs.pop("end_percent")),
            **inputs,
        )
        return io.NodeOutput(attach(model, feature))
