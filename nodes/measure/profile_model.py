from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ...methods.cache.profile_files import check_name
from ...patching.profile import MODES, Asked, measure
from ...patching.profile_report import FOLDER, picture, report, save
from ...patching.sampling import Job


class ProfileModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraProfileModel",
            display_name="Profile Model",
            category="Tessera/measure",
            description="Shows where the time and the arithmetic of your own graph go: attention, linear layers, convolutions, norms "
            "and the rest, by block, with attention's lengths and memory. Names the bottleneck and which nodes act on it. "
            "Samples with all patches of the MODEL in place, or counts from shapes without computing.",
            search_aliases=["profiler", "benchmark", "FLOPs", "TFLOP", "bottleneck", "torch profiler", "Perfetto", "trace",
                            "roofline", "DiTProfiler", "why is it slow"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to look at, with its patches: caches show as steps that are replayed."),
                io.Conditioning.Input("positive", tooltip="A prompt like those that you use; its length counts."),
                io.Conditioning.Input("negative", tooltip="Negative prompt; unused at cfg 1."),
                io.Latent.Input("latent", tooltip="Start latent; its size decides nearly everything."),
                io.Noise.Input("noise", tooltip="Noise, for example from RandomNoise."),
                io.Sampler.Input("sampler", tooltip="Sampler, for example from KSamplerSelect."),
                io.Sigmas.Input("sigmas", tooltip="The whole noise schedule, for example from BasicScheduler."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="Guidance. 1 evaluates the positive prompt alone, and halves the arithmetic."),
                io.Combo.Input("mode", options=list(MODES),
                    tooltip="events: samples twice, without and with hooks that wait for the device, and tells time and arithmetic by class and "
                            "block. analytic: arithmetic, bytes and lengths from shapes, nothing is computed. trace: samples under "
                            "torch's profiler and saves a trace for ui.perfetto.dev."),
                io.Int.Input("steps", default=8, min=0, max=1000,
                    tooltip="Steps that are measured, from the first of the schedule on; 0 measures all. A cache shows what it saves only "
                            "after its warm-up. More take longer."),
                io.String.Input("name", default="",
                    tooltip="Saves the report as output/tessera_model_profiles/<name>.json, and a trace beside it; earlier ones of that name are "
                            "replaced. Empty saves nothing, but a trace is saved as trace."),
                io.Vae.Input("vae", optional=True, tooltip="Times the decoding of one picture too, beside the steps. Not in mode analytic."),
                io.Clip.Input("clip", optional=True, tooltip="Times the encoding of one prompt too, beside the steps. Not in mode analytic."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The same MODEL, unchanged; no hook stays on it."),
                io.String.Output(display_name="text", tooltip="The report as text: bottleneck, classes, lengths, advice."),
                io.Custom("TESSERA_REPORT").Output(display_name="report", tooltip="All numbers, as JSON; also in the run's history."),
                io.Image.Output(display_name="image", tooltip="Bars by class of operator, strips by block."),
            ],
            not_idempotent=True,  # it measures, and writes files
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, positive, negative, latent, noise, sampler, sigmas, cfg, mode, steps, name, vae=None, clip=None
    ):
        if name:
            name = check_name(name)  # before anything is sampled
        folder = Path(folder_paths.get_output_directory()) / FOLDER
        job = Job(positive, negative, latent, sampler, sigmas, noise, cfg)
        encode = None if clip is None else lambda: clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
        decode = None if vae is None else vae.decode
        trace = folder / f"{name or 'trace'}.trace.json" if mode == "trace" else None
        asked = Asked(mode, steps, encode, decode, trace)
        told = report(model, job, asked, measure(model, job, asked))
        if trace is not None:
            told["lines"].append(f"trace saved as {FOLDER}/{trace.name}; open it in ui.perfetto.dev")
        if name:
            told["lines"].append(f"saved as {FOLDER}/{save(folder, name, told).name}")
        return io.NodeOutput(model, "\n".join(told["lines"]), told, picture(told), ui={"tessera_report": [told]})


PROMPT = "a photograph of a lighthouse at dusk, long exposure, calm sea"  # encoders pad or cut: its words do not matter
