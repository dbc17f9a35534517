from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ...methods.quant.calibration import save
from ...patching.calibrate_quantization import FOLDER, calibrate, lines_of
from ...patching.quant_widgets import QuantizationSocket, file_name
from ...patching.sampling import Job


class CalibrateQuantization(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraCalibrateQuantization",
            display_name="Calibrate Quantization",
            category="Tessera/loaders",
            description="Samples once with the plain MODEL and records what the inputs of its layers look like: which channels are large, how tokens "
            "differ, and some of them. Quantize Model chooses rotation, smoothing and scales by it.",
            search_aliases=["activation statistics", "SmoothQuant", "imatrix", "importance matrix", "calibration data", "PTQ"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model in full precision, with the LoRAs that it will be quantized with."),
                io.Conditioning.Input("positive", tooltip="A prompt like those to come."),
                io.Conditioning.Input("negative", tooltip="Its negative prompt; unused at cfg 1."),
                io.Latent.Input("latent", tooltip="Start latent. A batch of several pictures shows more of what can come."),
                io.Noise.Input("noise", tooltip="Noise, for example from RandomNoise."),
                io.Sampler.Input("sampler", tooltip="Sampler, for example from KSamplerSelect."),
                io.Sigmas.Input("sigmas", tooltip="Noise schedule, for example from BasicScheduler. Eight steps are enough."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Guidance of the job."),
                io.Int.Input("rows", default=256, min=16, max=4096, advanced=True,
                    tooltip="Inputs that are kept of each layer, drawn evenly from all tokens and steps. More measure better, take longer and more memory."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFF, advanced=True, tooltip="Which inputs are drawn."),
                io.String.Input("exclude", default="", advanced=True,
                    tooltip="As in Quantize Model: layers whose name this regular expression finds are not recorded. Empty takes our own list."),
                io.String.Input("filename", default="",
                    tooltip="Saves the calibration as output/tessera_calibrations/<filename>.safetensors, to use it again. Empty saves nothing."),
            ],
            outputs=[
                QuantizationSocket.Output(display_name="calibration", tooltip="For Quantize Model."),
                io.Latent.Output(display_name="latent", tooltip="The result of this run, which is the plain one."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, positive, negative, latent, noise, sampler, sigmas, cfg, rows, seed, exclude, filename):
        name = file_name(filename) if filename else ""
        job = Job(positive, negative, latent, sampler, sigmas, noise, cfg)
        found, samples = calibrate(model, job, rows, seed, exclude)
        lines = lines_of(found)
        if name:
            path = Path(folder_paths.get_output_directory()) / FOLDER / name
            path.parent.mkdir(parents=True, exist_ok=True)
            save(path, found)
            lines = [*lines, f"saved as {FOLDER}/{name}"]
        report = {"kind": "lines", "lines": lines}
        return io.NodeOutput(found, {**latent, "samples": samples}, ui={"tessera_report": [report]})
