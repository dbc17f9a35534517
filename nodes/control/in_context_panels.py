from comfy_api.latest import io

from ...methods.control.panels import MOST, chosen, parse
from ...patching.panels import panels as make


class InContextPanels(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraInContextPanels",
            display_name="In-Context Panels",
            category="Tessera/control",
            description="Several panels in one picture whose tokens share positions, so that the same place of each panel is the same place to "
            "attention (DiffDecompose). For FLUX and LoRA that were trained on panels; a panel can be given and held as it is.",
            search_aliases=["DiffDecompose", "layer position encoding cloning", "LPEC", "in-context LoRA", "IC-LoRA", "diptych", "panels",
                            "layer decomposition", "grid of pictures"],
            inputs=[
                io.Model.Input("model", tooltip="FLUX.1, FLUX.2 or another model of that class."),
                io.Latent.Input("latent", tooltip="One panel, empty or not: its size is that of every panel. Its width and height in latent cells "
                                                  "must be whole tokens (FLUX.1: multiples of 16 pixels)."),
                io.Int.Input("panels", default=2, min=1, max=MOST,
                    tooltip="Panels of the canvas, 1 to 6. The cost of attention grows with their number squared."),
                io.Combo.Input("axis", options=["width", "height"], tooltip="width: panels side by side. height: panels below each other."),
                io.String.Input("clone", default="all",
                    tooltip='Whose positions each panel takes. "all": all panels those of the first. "none": each its own, the stock picture. A list '
                            'like "0,0,1": for each panel the place, from 0, whose positions it takes; panels with the same number share them.'),
                io.String.Input("index_per_panel", default="",
                    tooltip='What tells panels with the same positions apart: a number for each panel on the first axis, like "0,0,1". Empty is 0 for '
                            "all, as in a stock picture. Kontext's references have 1."),
                io.String.Input("clean_panels", default="",
                    tooltip='Panels, from 0, that are given and kept, like "0": what they show comes from `clean`. Empty draws all of them.'),
                io.Latent.Input("clean", optional=True,
                    tooltip="Pictures of clean_panels: one for all, or as many as panels named, in that order. The size of a panel."),
            ],
            outputs=[
                io.Model.Output(tooltip="The MODEL whose positions know the panels. Sample the LATENT beside it with this MODEL."),
                io.Latent.Output(tooltip="The canvas: all panels in one latent, with a noise mask where panels are kept."),
            ],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, latent, panels, axis, clone, index_per_panel, clean_panels, clean=None):
        layout = parse(panels, axis, clone, index_per_panel)
        return io.NodeOutput(*make(model, latent, layout, clean, chosen(clean_panels, panels), cls.hidden.unique_id))
