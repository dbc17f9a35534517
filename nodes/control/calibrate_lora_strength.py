import folder_paths
from comfy_api.latest import io

from ...methods.control.lora_chart import chart
from ...methods.control.lora_curve import DEFAULT, MEASURES, strengths_of
from ...patching.lora import read
from ...patching.lora_response import CurveSocket, lines, measure
from ...patching.sampling import Job


class CalibrateLoraStrength(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraCalibrateLoraStrength",
            display_name="Calibrate LoRA Strength",
            category="Tessera/control",
            description="Measures on your own job how strongly a LoRA acts at several strengths, and fits a curve by which Apply Calibrated LoRA makes "
            "the amount linear: half the amount is half the effect.",
            search_aliases=["LiON-LoRA", "linear LoRA strength", "LoRA slider", "LoRA scale", "motion amplitude", "camera LoRA"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The MODEL without this LoRA. It is left as it is."),
                io.Combo.Input("lora", options=folder_paths.get_filename_list("loras"), tooltip="A file in models/loras, in any layout that ComfyUI loads."),
                io.Conditioning.Input("positive", tooltip="A prompt like those to come, with the LoRA's trigger word if it has one."),
                io.Conditioning.Input("negative", tooltip="Its negative prompt; unused at cfg 1."),
                io.Latent.Input("latent", tooltip="Start latent of the size to come. More pictures in the batch make the curve steadier."),
                io.Noise.Input("noise", tooltip="Noise, for example from RandomNoise; the same for every strength."),
                io.Sampler.Input("sampler", tooltip="Sampler, for example from KSamplerSelect; one that adds no noise of its own measures best."),
                io.Sigmas.Input("sigmas", tooltip="Noise schedule, for example from BasicScheduler. It is sampled once for each strength: 6 to 8 steps are enough."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Guidance of the job. 1 evaluates the positive prompt alone."),
                io.String.Input("strengths", default=", ".join(f"{s:g}" for s in DEFAULT),
                    tooltip="Strengths to measure at, with commas, 0 and 1 among them. More follow the curve closer and take longer: one run each."),
                io.Combo.Input("measure", options=list(MEASURES),
                    tooltip="The effect: difference to the latent without the LoRA, or motion, the difference between a video's neighbouring frames."),
            ],
            outputs=[
                CurveSocket.Output(display_name="curve", tooltip="For Apply Calibrated LoRA."),
                io.String.Output(display_name="json", tooltip="The same as text, to keep and to paste into Apply Calibrated LoRA."),
                io.Image.Output(display_name="chart", tooltip="Amount over strength: measured, fitted, and the straight line that it becomes."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, lora, positive, negative, latent, noise, sampler, sigmas, cfg, strengths, **given):
        asked = strengths_of(strengths)
        loaded = read(folder_paths.get_full_path_or_raise("loras", lora), model)
        job = Job(positive, negative, latent, sampler, sigmas, noise, cfg)
        curve = measure(model, job, loaded, asked, given["measure"])
        panel = {"kind": "lines", "lines": lines(curve)}
        return io.NodeOutput(curve, curve.to_json(), chart(curve), ui={"tessera_report": [panel]})
