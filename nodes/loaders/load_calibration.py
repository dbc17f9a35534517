import hashlib
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ...methods.files.shelf import Shelf
from ...methods.quant.calibration import load
from ...patching.calibrate_quantization import FOLDER, lines_of
from ...patching.quant_widgets import QuantizationSocket

SUFFIX = ".safetensors"


def shelf() -> Shelf:
    own = Path(folder_paths.get_output_directory()) / FOLDER
    return Shelf(own, Path(__file__).resolve().parents[2] / "presets" / "calibrations", SUFFIX)


class LoadCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraLoadCalibration",
            display_name="Load Calibration",
            category="Tessera/loaders",
            description="Loads what Calibrate Quantization saved, for Quantize Model.",
            search_aliases=["activation statistics", "calibration data", "imatrix"],
            inputs=[
                io.Combo.Input("calibration", options=shelf().names(),
                    tooltip="A file in output/tessera_calibrations, or the one for the digit image model that comes with the pack. Files put there appear after a refresh of the node list."),
            ],
            outputs=[
                QuantizationSocket.Output(display_name="calibration", tooltip="For Quantize Model, of the model that it was made with."),
                io.String.Output(display_name="about", tooltip="Layers, tokens and steps that were recorded."),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, calibration):
        if calibration not in shelf().names():
            return calibration
        stat = (shelf().folder(calibration) / calibration).stat()
        return hashlib.sha256(f"{calibration} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()

    @classmethod
    def execute(cls, calibration):
        if calibration not in shelf().names():
            raise ValueError(
                f"There is no calibration {calibration!r} in {FOLDER}. Make one with Calibrate Quantization."
            )
        found = load(shelf().folder(calibration) / calibration)
        return io.NodeOutput(found, "\n".join(lines_of(found)))
