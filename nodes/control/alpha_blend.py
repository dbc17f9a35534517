from comfy_api.latest import io

from ...methods.control.blend import MODES, blend, layers, together


class AlphaBlend(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraAlphaBlend",
            display_name="Alpha Blend",
            category="Tessera/control",
            description="Lays a foreground over a background by one of the four blends that layer decomposition is about, in a form that "
            "Alpha Unblend undoes exactly.",
            search_aliases=["DiffDecompose", "alpha composite", "blend modes", "screen", "multiply", "layers", "transparency", "RGBA"],
            inputs=[
                io.Image.Input("foreground", tooltip="Picture on top, 0 to 1. A fourth channel is its alpha, where no `alpha` is connected."),
                io.Image.Input("background", tooltip="Picture below, of the same size."),
                io.Combo.Input("mode", options=list(MODES),
                    tooltip="alpha: covers. screen: lightens, as a projection does. add: light on light, may exceed 1, which saving cuts off. "
                            "multiply: darkens, as tinted glass does."),
                io.Float.Input("strength", default=1.0, min=0.0, max=1.0, step=0.01, round=0.001,
                    tooltip="Multiplies alpha. 0 is the background, bit for bit; higher shows more of the foreground."),
                io.Mask.Input("alpha", optional=True,
                    tooltip="Where the foreground covers: 1 is opaque, 0 clear. Load Image's MASK is the other way round: put Invert Mask between."),
            ],
            outputs=[
                io.Image.Output(tooltip="The composite. Alpha Unblend, with the background and the alpha, gives the foreground back."),
                io.Mask.Output(display_name="alpha", tooltip="The alpha that was used, strength included: 1 is opaque."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, foreground, background, mode, strength, alpha=None):
        background = background[..., :3]
        found = together("Alpha Blend", foreground=foreground, background=background, alpha=alpha)
        colours, covers = layers(found[0], found[2] if alpha is not None else None, strength)
        return io.NodeOutput(blend(colours, found[1], covers, mode), covers)
