from comfy_api.latest import io

from ...methods.control.blend import MODES, together, unblend


class AlphaUnblend(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraAlphaUnblend",
            display_name="Alpha Unblend",
            category="Tessera/control",
            description="Takes a known background out of a composite: the foreground exactly where alpha is given, or the most transparent one that "
            "explains the composite, and what neither explains.",
            search_aliases=["DiffDecompose", "layer decomposition", "color to alpha", "remove background", "un-composite", "matting",
                            "watermark removal"],
            inputs=[
                io.Image.Input("composite", tooltip="The picture that shows foreground over background, 0 to 1."),
                io.Image.Input("background", tooltip="The picture below alone, of the same size and registered with it pixel for pixel."),
                io.Combo.Input("mode", options=list(MODES), tooltip="The blend that made the composite, as in Alpha Blend."),
                io.Mask.Input("alpha", optional=True,
                    tooltip="The alpha that made the composite: 1 is opaque. Without it the smallest one that explains the composite is found."),
            ],
            outputs=[
                io.Image.Output(display_name="foreground", tooltip="Its colours, 0 to 1; where alpha is 0 nothing tells them: black, or white in multiply."),
                io.Mask.Output(display_name="alpha", tooltip="The alpha given, or the one found: 1 is opaque."),
                io.Image.Output(display_name="residual", tooltip="How far the composite is from what foreground, alpha and background give, 0 to 1. "
                                                                 "Black where all is explained."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, composite, background, mode, alpha=None):
        composite, background = composite[..., :3], background[..., :3]
        found = together("Alpha Unblend", composite=composite, background=background, alpha=alpha)
        covers = found[2].to(composite).clamp(0, 1) if alpha is not None else None
        foreground, covers, residual = unblend(found[0], found[1], mode, covers)
        lines = [f"residual: greatest {residual.max().item():.3g}, mean {residual.mean().item():.3g}"]
        return io.NodeOutput(foreground, covers, residual, ui={"tessera_report": [{"kind": "lines", "lines": lines}]})
