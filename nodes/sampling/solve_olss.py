from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ...methods.sampling.olss import PATHS, PRIORS
from ...methods.sampling.olss_files import FOLDER, check_name, save
from ...patching.olss import TrajectorySocket, sampler_of
from ...patching.olss_solve import Asked, solve


class SolveOlss(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraSolveOlss",
            display_name="Solve OLSS",
            category="Tessera/sampling",
            description="Fits a sampler of few steps to recorded runs of your own model: it comes nearer to the many-step picture than a general "
            "sampler with as many steps, and says by how much on seeds that it has not seen.",
            search_aliases=["OLSS", "Optimal Linear Subspace Search", "OLSSSolve", "OLSSSampler", "learned scheduler", "few steps", "fast sampler"],
            is_output_node=True,
            inputs=[
                TrajectorySocket.Input("trajectory", tooltip="Runs from Record Trajectory."),
                io.Int.Input("steps", default=8, min=1, max=50,
                    tooltip="Steps of the new sampler, one evaluation each; at most those of the recorded runs. Fewer are faster and less exact."),
                io.Combo.Input("path", options=[*PATHS], default="auto",
                    tooltip="Which of the recorded sigmas it visits. uniform: evenly spaced in the recorded schedule. graph: searched so that every "
                            "step is equally hard. auto: tries these, between them and further, as many as trials says. karras: nearest to Karras' schedule."),
                io.Float.Input("ridge", default=1e-4, min=0.0, max=1.0, step=1e-5, round=1e-9,
                    tooltip="How strongly the fit is held to the prior, 0 to 1. Higher is safer with few runs, lower follows them closer; 0 can explode."),
                io.Combo.Input("prior", options=[*PRIORS], advanced=True,
                    tooltip="The rule that the fit starts from: euler, ab2 (two-step Adams-Bashforth), or zero, none at all."),
                io.Float.Input("holdout", default=0.25, min=0.0, max=0.5, step=0.05, round=0.01,
                    tooltip="Part of the seeds that the fit does not see and that it is judged by, 0 to 0.5. 0 judges nothing."),
                io.Boolean.Input("check", default=True,
                    tooltip="Really samples the held-out seeds with the new sampler, euler and dpmpp_2m at as many steps and reports the errors. Off "
                            "judges the fit alone."),
                io.String.Input("name", default="",
                    tooltip="Saves the sampler as output/tessera_olss/<name>.safetensors for Load OLSS; an earlier one of that name is replaced. Empty saves nothing."),
                io.Int.Input("trials", default=24, min=0, max=1000, optional=True,
                    tooltip="Times that the seeds learnt from are sampled with the new sampler, to choose its sigmas and to fit it to what it meets itself. "
                            "More come nearer and take longer, each the new steps on every seed; 0 fits to the recording alone, at once."),
            ],
            outputs=[
                io.Sampler.Output(display_name="sampler", tooltip="The fitted SAMPLER, for SamplerCustomAdvanced. It takes only the sigmas beside it."),
                io.Sigmas.Output(display_name="sigmas", tooltip="The schedule that belongs to it."),
                io.String.Output(display_name="report", tooltip="The path, the largest coefficient and the errors on held-out seeds."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, trajectory, steps, path, ridge, prior, holdout, check, name, trials=24):
        if name:
            check_name(name)  # before minutes are spent
        table, lines = solve(trajectory, Asked(steps, path, ridge, prior, holdout, check, trials))
        if name:
            written = save(Path(folder_paths.get_output_directory()) / FOLDER, name, table)
            lines = [*lines, f"saved as {FOLDER}/{written.name}"]
        report = {"kind": "lines", "lines": lines}
        return io.NodeOutput(sampler_of(table), table.sigmas.float(), "\n".join(lines), ui={"tessera_report": [report]})
