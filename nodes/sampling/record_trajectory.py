from comfy_api.latest import io

from ...patching.olss import TEACHERS, TrajectorySocket, record
from ...patching.sampling import Job


class RecordTrajectory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraRecordTrajectory",
            display_name="Record Trajectory",
            category="Tessera/sampling",
            description="Samples your job with many steps from several seeds and records the way from noise to picture. Solve OLSS learns from it "
            "how to do the same in few steps.",
            search_aliases=["OLSS", "Optimal Linear Subspace Search", "OLSSRecord", "learn scheduler", "fewer steps", "fast sampler"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to come, with its LoRAs and Tessera nodes. Caches on it are recorded as they answer."),
                io.Conditioning.Input("positive", tooltip="A prompt like those to come."),
                io.Conditioning.Input("negative", tooltip="Its negative prompt; unused at cfg 1."),
                io.Latent.Input("latent", tooltip="Start latent of the size to come. Each picture of the batch is a recorded run."),
                io.Noise.Input("noise", tooltip="Noise of the first seed, for example from RandomNoise; the others follow it."),
                io.Sigmas.Input("sigmas", tooltip="The teacher's schedule, for example of BasicScheduler with 50 steps. More steps make a better teacher "
                                                  "and take longer; the fitted sampler visits some of its sigmas."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="Guidance to come: it is learnt with the rest. 1 evaluates the positive prompt alone."),
                io.Int.Input("runs", default=8, min=1, max=256,
                    tooltip="Seeds to record, one full run each. More carry over better to other seeds and prompts and take longer."),
                io.Combo.Input("teacher", options=[*TEACHERS],
                    tooltip="How the recorded runs step: euler, 1 evaluation a step, or heun, 2 and far more exact."),
                io.Int.Input("elements", default=65536, min=256, max=1 << 24, step=256, advanced=True,
                    tooltip="Most numbers of each picture that are compared, at the same random places in every state. More take memory: 4 bytes x steps "
                            "for each, twice that while recording."),
            ],
            outputs=[
                TrajectorySocket.Output(display_name="trajectory", tooltip="The recorded runs, for Solve OLSS."),
                io.String.Output(display_name="report", tooltip="What was recorded: model, size, runs, steps."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, positive, negative, latent, noise, sigmas, cfg, runs, teacher, elements):
        made = record(model, Job(positive, negative, latent, None, sigmas, noise, cfg), runs, teacher, elements)
        return io.NodeOutput(made, "\n".join(f"{name}: {value}" for name, value in made.about.items()))
