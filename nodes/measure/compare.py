from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io

from ...methods.files.shelf import plain_name
from ...methods.measure.chart import front_chart, strip
from ...methods.measure.compare_files import FOLDER, save
from ...patching.compare import compare
from ...patching.decoding import decoder
from ...patching.sampling import Job

FURTHER = [f"model_{letter}" for letter in "cdefghijklmnopqrstuvwxyz"]


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraCompare",
            display_name="Compare",
            category="Tessera/measure",
            description="Samples the same job with two or more MODELs, in alternation and warm, and shows what the others "
            "gain and lose against the first: time, blocks and attention pairs computed, memory, error by step, PSNR and SSIM.",
            search_aliases=["A/B", "benchmark", "speed test", "before after", "PSNR", "SSIM", "timing", "quality", "pareto",
                            "front chart", "csv"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model_a", tooltip="The reference, usually the plain MODEL."),
                io.Model.Input("model_b", tooltip="The MODEL to judge against it."),
                io.Conditioning.Input("positive", tooltip="Prompt for both."),
                io.Conditioning.Input("negative", tooltip="Negative prompt for both; unused at cfg 1."),
                io.Latent.Input("latent", tooltip="Start latent for both; its size sets the size of the picture."),
                io.Noise.Input("noise", tooltip="Noise for both, for example from RandomNoise."),
                io.Sampler.Input("sampler", tooltip="Sampler for both, for example from KSamplerSelect."),
                io.Sigmas.Input("sigmas", tooltip="Noise schedule for both, for example from BasicScheduler."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="Guidance for both. 1 evaluates the positive prompt alone."),
                io.Int.Input("repeats", default=3, min=1, max=20,
                    tooltip="Timed runs of each MODEL. More give a steadier ratio and take longer."),
                io.Combo.Input("decode", options=["vae", "digits", "none"],
                    tooltip="How latents become pictures for PSNR, SSIM and the image: the connected VAE, the digit models' own codec, or not at all."),
                io.Vae.Input("vae", optional=True, tooltip="Needed for decode = vae."),
                io.Autogrow.Input("more", optional=True, tooltip="Further MODELs to judge against model_a.",
                    template=io.Autogrow.TemplateNames(
                        io.Model.Input("model", tooltip="A further MODEL to judge against model_a."), names=FURTHER, min=0)),
                io.String.Input("labels", default="", optional=True, advanced=True,
                    tooltip="Names for the table and the chart, separated by commas: plain, cached, sparse. Empty: a, b, c…"),
                io.String.Input("save_as", default="", optional=True, advanced=True,
                    tooltip="Saves the report as output/tessera_compare/<name>_00001.json and .csv. Empty saves nothing."),
            ],
            outputs=[
                io.Latent.Output(display_name="latent_a", tooltip="Result of MODEL a."),
                io.Latent.Output(display_name="latent_b", tooltip="Result of MODEL b."),
                io.Image.Output(display_name="image", tooltip="a, b and their stretched difference, side by side; of more MODELs all above their differences from a. A black pixel with decode = none."),
                io.Custom("TESSERA_REPORT").Output(display_name="report", tooltip="All numbers, as JSON; also in the run's history."),
                io.Image.Output(display_name="chart", tooltip="Speed against loss, one point a MODEL; a line joins those that none beats in both."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model_a, model_b, positive, negative, latent, noise, sampler, sigmas, cfg, repeats, decode,
                vae=None, more=None, labels="", save_as=""):  # fmt: skip
        if model_a is None or model_b is None:
            raise ValueError(
                f"Compare got no MODEL at {'model_a' if model_a is None else 'model_b'}: the node before it returned nothing."
            )
        if save_as:
            plain_name(save_as, ".json", "file name")  # before minutes are spent
        pictured = decoder("Compare", decode, vae)
        job = Job(positive, negative, latent, sampler, sigmas, noise, cfg)
        further = [model for _, model in sorted((more or {}).items()) if model is not None]
        names = labels.split(",") if labels.strip() else []
        samples, pictures, report = compare((model_a, model_b, *further), job, repeats, pictured, names)
        if save_as:
            paths = save(Path(folder_paths.get_output_directory()) / FOLDER, save_as, report)
            report["files"] = [f"{FOLDER}/{path.name}" for path in paths]
        images = strip(pictures) if pictures else torch.zeros(1, 1, 1, 3)
        chart = front_chart(report["points"], report["loss_of"])
        a, b = ({**latent, "samples": made} for made in samples[:2])
        return io.NodeOutput(a, b, images, report, chart, ui={"tessera_report": [report]})
