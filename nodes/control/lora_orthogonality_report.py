import json

import folder_paths
from comfy_api.latest import io

from ...patching.lora import read
from ...patching.lora_report import lines, measure, picture, told
from ...patching.lora_stack import text_lines
from ...patching.quant_widgets import QuantizationSocket

NONE = "none"
COUNT = 4


class LoraOrthogonalityReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = [NONE, *folder_paths.get_filename_list("loras")]
        return io.Schema(
            node_id="TesseraLoraOrthogonalityReport",
            display_name="LoRA Orthogonality Report",
            category="Tessera/control",
            description="Tells how far up to four LoRA get in each other's way: the cosine between what they add to each layer, and how large that is, as "
            "a heat map, a table and JSON.",
            search_aliases=["LiON-LoRA", "LoRA compatibility", "LoRA similarity", "LoRA conflict", "LoRA cosine", "LoRA norm", "compare LoRA"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that the LoRA are made for. It is left as it is."),
                *(
                    io.Combo.Input(f"lora_{i + 1}", options=names,
                        tooltip=f"LoRA {i + 1}, a file in models/loras, in any layout that ComfyUI loads; none leaves it out.")
                    for i in range(COUNT)
                ),
                io.Combo.Input("rows", options=["auto", "layers", "blocks"], advanced=True,
                    tooltip="Rows of the heat map: single layers or whole blocks. auto takes blocks where there are more than 96 layers. JSON always has layers."),
                QuantizationSocket.Input("calibration", optional=True,
                    tooltip="From Calibrate Quantization on this model: then deltas count by what they do to the inputs that were recorded there, not by their weights."),
            ],
            outputs=[
                io.Image.Output(display_name="heat_map", tooltip="A row for each layer, a column for each pair: green is orthogonal, red the same direction."),
                io.String.Output(display_name="json", tooltip="Norms and cosines of every layer, means of every pair."),
                io.Custom("TESSERA_REPORT").Output(display_name="report", tooltip="The same as an object, for the run's history."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, rows, calibration=None, **given):
        names = [name for i in range(COUNT) if (name := given[f"lora_{i + 1}"]) != NONE]
        if not names:
            raise ValueError("LoRA Orthogonality Report has no LoRA to measure; choose at least one.")
        loras = [read(folder_paths.get_full_path_or_raise("loras", name), model) for name in names]
        found = measure(model, loras, calibration)
        report = told(loras, found)
        panel = {"kind": "lines", "lines": [*lines(loras, found), *text_lines(loras, None)]}
        return io.NodeOutput(picture(loras, found, rows), json.dumps(report), report, ui={"tessera_report": [panel]})
