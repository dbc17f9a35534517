from comfy_api.latest import io

from ...methods.cache.schedule_search import METRICS, Rules, budget_of, search
from ...patching.cache_widgets import CalibrationSocket, ScheduleSocket


class CacheSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraCacheSchedule",
            display_name="Cache Schedule",
            category="Tessera/cache",
            description="Chooses which steps a cache computes, for a number of full steps or a wanted speed-up: the best of "
            "all schedules by what Calibrate Cache recorded, found exactly.",
            search_aliases=["DDT", "decoupled diffusion transformer", "dynamic programming", "steps mask", "SCM",
                            "steps computation mask", "skip schedule"],
            is_output_node=True,
            inputs=[
                CalibrationSocket.Input("calibration", tooltip="From Calibrate Cache, on the MODEL, sampler and schedule to come."),
                io.Combo.Input("target", options=["speedup", "full_steps"],
                    tooltip="What is given: a speed-up in evaluations, or how many steps are computed."),
                io.Float.Input("speedup", default=2.0, min=1.0, max=10.0, step=0.1, round=0.01,
                    tooltip="With target speedup: steps of the run for each computed one. Higher is faster and less exact; 1 computes all."),
                io.Int.Input("full_steps", default=10, min=1, max=1000,
                    tooltip="With target full_steps: the most steps that are computed. Higher is slower and more exact."),
                io.Combo.Input("metric", options=list(METRICS), default="taylor1_error",
                    tooltip="The error of a skipped step: taylor1_error for caches that forecast (Taylor Cache), the other two for those that reuse "
                            "(by direction, or by size of the change)."),
                io.Int.Input("force_first", default=1, min=1, max=100,
                    tooltip="Steps at the start that are always computed. Higher keeps the composition closer to the plain run."),
                io.Int.Input("force_last", default=1, min=0, max=100,
                    tooltip="Steps at the end that are always computed. Higher keeps fine detail."),
                io.Int.Input("max_gap", default=0, min=0, max=50, advanced=True,
                    tooltip="Most steps from one computed to the next; 0 allows any. Lower spreads the computed steps more evenly."),
            ],
            outputs=[
                ScheduleSocket.Output(display_name="schedule", tooltip="Connect it to `schedule` of a cache node."),
                io.String.Output(display_name="text", tooltip="The schedule as JSON: 1 is computed, 0 skipped, with the sigmas of the steps."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, calibration, target, speedup, full_steps, metric, force_first, force_last, max_gap):
        budget = budget_of(calibration.steps, speedup) if target == "speedup" else full_steps
        schedule, total = search(calibration, metric, Rules(budget, force_first, force_last, max_gap))
        shown = "".join("█" if computed else "·" for computed in schedule.mask)
        lines = [f"computes {schedule.full} of {calibration.steps} steps: {shown}", f"sum of {metric}: {total:.4g}"]
        return io.NodeOutput(schedule, schedule.to_json(), ui={"tessera_report": [{"kind": "lines", "lines": lines}]})
