from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ...methods.quant.formats import FORMATS
from ...methods.quant.rotation import KINDS
from ...patching.quant_layer import Asked
from ...patching.quant_widgets import QuantizationSocket, file_name
from ...patching.quantize import quantize


class QuantizeModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraQuantizeModel",
            display_name="Quantize Model",
            category="Tessera/loaders",
            description="Makes a model smaller: its large layers in 3, 4 or 8 bits, saved in models/diffusion_models, and loaded from there. "
            "Twin-log tables (tlq4) lose about half of what plain 4-bit integers lose, at the same size.",
            search_aliases=["LRQ-DiT", "twin-log", "SVDQuant", "QuaRot", "ConvRot", "Hadamard rotation", "NVFP4", "GGUF quantize",
                            "convert to fp8", "int4", "int8", "smaller model", "low VRAM"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model in full precision. Its LoRAs are baked in; features of earlier nodes stay on the result."),
                io.Combo.Input("format", options=list(FORMATS),
                    tooltip="What weights become. tlq4: 4.25 bits, the best picture for its size. tlq3: smallest. int8_row: 8 bits, hardly to be told from "
                            "the original. fp8_e4m3, nvfp4 and mxfp8 load in ComfyUI's own loader too, and are quick where the GPU has them. "
                            "svdquant_int4: 4 bits beside a low-rank branch, for activations in int4."),
                io.String.Input("filename", default="quantized_model",
                    tooltip="Name of the file below models/diffusion_models, without .safetensors."),
                io.Combo.Input("existing", options=["refuse", "reuse", "replace"],
                    tooltip="Where a file of that name is there: stop with a sentence; use it if it was made from this model in the same way; or write it anew."),
                io.Combo.Input("activations", options=["none", "int8", "fp8", "int4"],
                    tooltip="What the inputs of quantized layers are rounded to, per token. none is closest to the original; int8 and fp8 are faster where the "
                            "GPU multiplies in them; int4 loses most."),
                io.Combo.Input("rotation", options=["auto", *KINDS], advanced=True,
                    tooltip="Turns the input channels of a layer, so that outliers are spread. auto tries them on each layer, by measured error with a calibration."),
                io.Boolean.Input("smoothing", default=True, advanced=True,
                    tooltip="With a calibration: also moves outliers from activations into weights, where that lowers the measured error."),
                io.Int.Input("group", default=0, min=0, max=256, step=16, advanced=True,
                    tooltip="Columns that share a scale, for tlq4, tlq3 and int4_g64: 16, 32, 64, 128 or 256. Lower is closer and larger; 0 takes the format's own (64)."),
                io.Int.Input("rank", default=32, min=0, max=256, step=16, advanced=True,
                    tooltip="svdquant_int4: rank of the branch in 16 bits. Higher is closer, larger and slower."),
                io.String.Input("exclude", default="", advanced=True,
                    tooltip="A regular expression: layers whose name it finds stay as they are. It takes the place of our own list (norms, modulation, "
                            "embeddings, first and last layers). Empty keeps our list."),
                QuantizationSocket.Input("calibration", optional=True,
                    tooltip="From Calibrate Quantization: what each layer's inputs look like, so that what matters is kept best."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The quantized MODEL, loaded from the file. LoRAs after it are exact."),
                io.String.Output(display_name="report", tooltip="What became of the layers: sizes and errors."),
            ],
            not_idempotent=True,  # it writes a file
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, format, filename, existing, activations, rotation, smoothing, group, rank, exclude, calibration=None
    ):
        asked = Asked(format, activations, rotation, smoothing, group, rank)
        folder = Path(folder_paths.get_folder_paths("diffusion_models")[0])
        made, lines = quantize(model, asked, calibration, folder / file_name(filename), exclude, existing)
        return io.NodeOutput(made, "\n".join(lines), ui={"tessera_report": [{"kind": "lines", "lines": lines}]})
