from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ...methods.cache.profile_files import FOLDER, check_name, save
from ...methods.cache.solver import Goal
from ...patching.cache_widgets import ProfileSocket
from ...patching.sampling import Job
from ...patching.solve_threshold import KNOBS, Asked, solve


class SolveThreshold(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraSolveThreshold",
            display_name="Solve Threshold",
            category="Tessera/measure",
            description="Answers which threshold or schedule to set on a cache: you give the largest error of the final latent, "
            "or the speed-up that you want, and it finds the setting on your own graph, checks it on several seeds and saves "
            "it as a profile.",
            search_aliases=["auto threshold", "tune cache", "TeaCache threshold", "rel_l1_thresh", "calibrate cache",
                            "target error", "target speedup", "cache profile"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="A MODEL after a cache node; its other settings (level, order, policy, warm-up) are kept."),
                io.Conditioning.Input("positive", tooltip="A prompt like those to come."),
                io.Conditioning.Input("negative", tooltip="Its negative prompt; unused at cfg 1."),
                io.Latent.Input("latent", tooltip="Start latent of the size to come. More pictures in the batch make the result steadier."),
                io.Noise.Input("noise", tooltip="Noise of the first seed, for example from RandomNoise; the others follow it."),
                io.Sampler.Input("sampler", tooltip="Sampler to come, for example from KSamplerSelect."),
                io.Sigmas.Input("sigmas", tooltip="Noise schedule to come, for example from BasicScheduler."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="Guidance to come. 1 evaluates the positive prompt alone."),
                io.Combo.Input("target", options=["error", "speedup"],
                    tooltip="What is given: the error of the final latent, or the speed-up in evaluations."),
                io.Float.Input("error", default=0.05, min=0.0001, max=2.0, step=0.005, round=0.0001,
                    tooltip="With target error: root mean square of the difference to the plain run's final latent, relative to it. Lower is closer to "
                            "the plain picture and slower."),
                io.Float.Input("speedup", default=2.0, min=1.05, max=10.0, step=0.1, round=0.01,
                    tooltip="With target speedup: evaluations of the run for each computed one. Higher is faster and less exact."),
                io.Float.Input("tolerance", default=0.1, min=0.01, max=1.0, step=0.01, round=0.001,
                    tooltip="With target error: by what part of it runs from other seeds may miss it, 0 to 1. Lower skips later in the run, where seeds "
                            "differ less, and is slower; higher skips earlier and is faster."),
                io.Combo.Input("knob", options=list(KNOBS), advanced=True,
                    tooltip="What is set: the cache's threshold, or a schedule of computed steps. auto takes the threshold where the cache has one."),
                io.Int.Input("seeds", default=4, min=1, max=16, advanced=True,
                    tooltip="Seeds that every setting is run with. More carry over better to other seeds and take longer."),
                io.Int.Input("rounds", default=10, min=1, max=32, advanced=True,
                    tooltip="Most settings that are really run. More come nearer and take longer."),
                io.String.Input("name", default="",
                    tooltip="Saves the profile as output/tessera_profiles/<name>.json for Load Cache Profile; an earlier one of that name is replaced. Empty saves nothing."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The MODEL with the setting that was found. Connect it to the sampler."),
                ProfileSocket.Output(display_name="profile", tooltip="The setting, for `profile` of the same kind of cache node."),
                io.String.Output(display_name="report", tooltip="What was tried: settings, evaluations and errors."),
            ],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # it writes a file, and the MODEL that it gives carries a feature of its own
        )  # fmt: skip

    @classmethod
    def execute(cls, model, positive, negative, latent, noise, sampler, sigmas, cfg, target, error, speedup, tolerance,
                knob, seeds, rounds, name):  # fmt: skip
        if name:
            check_name(name)  # before minutes are spent
        job = Job(positive, negative, latent, sampler, sigmas, noise, cfg)
        goal = Goal(error if target == "error" else None, speedup, tolerance)
        made, profile, lines, _ = solve(model, job, Asked(goal, knob, seeds, rounds))
        if name:
            path = save(Path(folder_paths.get_output_directory()) / FOLDER, name, profile)
            lines = [*lines, f"saved as {FOLDER}/{path.name}"]
        report = {"kind": "lines", "lines": lines}
        return io.NodeOutput(made, profile, "\n".join(lines), ui={"tessera_report": [report]})
