from comfy_api.latest import io

from ...patching.cache_widgets import CalibrationSocket
from ...patching.calibrate import calibrate, lines_of
from ...patching.sampling import Job


class CalibrateCache(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraCalibrateCache",
            display_name="Calibrate Cache",
            category="Tessera/cache",
            description="Samples once with the plain MODEL and records how its output changes from step to step: for Cache "
            "Schedule, and MagCache's ratios and TeaCache's polynomial fitted on your own model for Step Cache.",
            search_aliases=["MagCache calibration", "TeaCache coefficients", "polynomial fit", "mag_ratios", "DDT similarity",
                            "encoder sharing", "record run", "cache profile"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The plain MODEL with its LoRAs, before any cache. It is left as it is."),
                io.Conditioning.Input("positive", tooltip="A prompt like those to come."),
                io.Conditioning.Input("negative", tooltip="Its negative prompt; unused at cfg 1."),
                io.Latent.Input("latent", tooltip="Start latent of the size to come. A batch is measured as a whole, and steadier."),
                io.Noise.Input("noise", tooltip="Noise, for example from RandomNoise."),
                io.Sampler.Input("sampler", tooltip="Sampler, for example from KSamplerSelect; one that evaluates each step and does not restart."),
                io.Sigmas.Input("sigmas", tooltip="Noise schedule, for example from BasicScheduler. All of it is sampled, once."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="Guidance of the job. One of its conditions is measured, the same that caches decide on."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, advanced=True,
                    tooltip="Which tokens and directions are sampled. The same seed measures the same ones."),
            ],
            outputs=[
                CalibrationSocket.Output(display_name="calibration", tooltip="For Cache Schedule and Step Cache."),
                io.String.Output(display_name="json", tooltip="The same as text, to keep or to paste elsewhere."),
                io.Latent.Output(display_name="latent", tooltip="The result of this run, which is the plain one."),
            ],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # its id is on the run that it records
        )  # fmt: skip

    @classmethod
    def execute(cls, model, positive, negative, latent, noise, sampler, sigmas, cfg, seed):
        job = Job(positive, negative, latent, sampler, sigmas, noise, cfg)
        found, samples = calibrate(model, job, seed, cls.hidden.unique_id)
        report = {"kind": "lines", "lines": lines_of(found)}
        made = {**latent, "samples": samples}
        return io.NodeOutput(found, found.to_json(), made, ui={"tessera_report": [report]})
