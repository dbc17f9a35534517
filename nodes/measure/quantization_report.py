import json

from comfy_api.latest import io

from ...patching.quant_report import lines_of, rows_of, with_errors


class QuantizationReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraQuantizationReport",
            display_name="Quantization Report",
            category="Tessera/measure",
            description="Tells how each layer of a MODEL is stored, in how many bits, and which product will really run on this device: in the "
            "format itself, decoded on the way, or as a dense copy, and why.",
            search_aliases=["quant inspect", "which format", "fp8 emulated", "model size", "bits per weight", "GGUF info"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="Any MODEL, quantized or not."),
                io.Model.Input("plain", optional=True, tooltip="The same model in full precision: then the error of each layer's weight is told."),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="A summary, one line for each kind of layer."),
                io.String.Output(display_name="json", tooltip="Every layer: format, bits, bytes, error and path."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, plain=None):
        rows = rows_of(model)
        rows = rows if plain is None else with_errors(rows, model, plain)
        lines = lines_of(rows)
        report = {"kind": "lines", "lines": lines}
        return io.NodeOutput(
            "\n".join(lines), json.dumps([row.told() for row in rows]), ui={"tessera_report": [report]}
        )
