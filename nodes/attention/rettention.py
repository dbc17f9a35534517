from comfy_api.latest import io

from ...methods.attention.rettention import Rettention as Method
from ...patching.attention import AttentionFeature
from ...patching.run import attach
from ...patching.widgets import where, where_inputs

FIRST = 5  # dense steps at the start, of 20 in the paper


class Rettention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraRettention",
            display_name="Rettention",
            category="Tessera/attention",
            description="Computes a few per cent of the attention pairs, and repairs the result with what a full step some steps ago said about the rest. "
            "Works with stock weights. interval 1 or density 1 changes nothing.",
            search_aliases=["Re-ttention", "sparse attention", "sparse softmax reshape", "attention cache", "DiTFastAttn", "residual attention"],
            inputs=[
                io.Model.Input("model", tooltip="A Diffusion Transformer whose token layout is known."),
                io.Float.Input("density", default=0.0625, min=0.005, max=1.0, step=0.005, round=0.00001,
                    tooltip="Share of the image keys that an image token sees on the steps in between, 0 to 1. Higher is closer to the plain picture and slower."),
                io.Combo.Input("pattern", options=["band_per_frame", "band", "circle", "frame_tile"],
                    tooltip="Which keys those are: a run of the row-by-row order in every frame (the paper's for video); one run of the whole sequence "
                            "(the paper's for images); a disc around the token in every frame, slower at the same density; its own frame and some frames that all see."),
                io.Int.Input("interval", default=5, min=1, max=50,
                    tooltip="Steps from one full step to the next. Higher is faster and less exact. 1 is off: every step stays dense."),
                io.Float.Input("ramp", default=0.04, min=0.0, max=0.2, step=0.01, round=0.001, advanced=True,
                    tooltip="Added to the share that the pattern is taken to hold, with every step since the full one, 0 to 0.2. Higher trusts the present more than the remembered rest. 0 keeps the share."),
                io.Boolean.Input("clamp_ratio", default=True, advanced=True,
                    tooltip="Keeps that share at 1 or below. Off lets a long interval with a high ramp make tokens too strong."),
                io.Boolean.Input("residual", default=True, advanced=True,
                    tooltip="Adds what all other keys gave at the full step. Off saves nearly all of the memory and is far less exact."),
                io.Boolean.Input("reshape", default=True, advanced=True,
                    tooltip="Scales the sparse result by the share that it held at the full step. Off takes the sparse softmax as it is: less exact."),
                io.Combo.Input("cache_device", options=["gpu", "cpu"], advanced=True,
                    tooltip="Where the rest is held. cpu saves VRAM and costs a transfer at each call."),
                io.Combo.Input("cache_dtype", options=["model", "float32", "bfloat16"], advanced=True,
                    tooltip="Precision of the rest. model keeps the model's own; bfloat16 halves the memory of fp32."),
                *where_inputs(dense_first_steps=FIRST),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with repaired sparse attention. Connect it to the sampler or the next node.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, density, pattern, interval, ramp, clamp_ratio, residual, reshape, cache_device,
                cache_dtype, dense_first_steps=FIRST, **shared):  # fmt: skip
        method = Method(density, pattern, interval, ramp, clamp_ratio, residual, reshape, cache_device, cache_dtype)
        places = where(dense_first_steps=dense_first_steps, **shared)
        feature = AttentionFeature(cls.hidden.unique_id, "Rettention", method=method, **places)
        return io.NodeOutput(attach(model, feature))
