from comfy_api.latest import io

from ...methods.sampling.flow import SOLVERS
from ...patching.flow_samplers import rf_solver


class RfSolverSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraRfSolverSampler",
            display_name="RF-Solver Sampler",
            category="Tessera/sampling",
            description="Follows the flow with a rule of second order: at equal evaluations far closer to the exact picture than Euler, and the sampler "
            "that comes back to the source after RF Invert. RF-Solver is the explicit midpoint rule.",
            search_aliases=["RF Solver", "RF-Edit", "FireFlow", "midpoint", "rectified flow sampler", "rf inversion sampler", "FluxTapoz", "Ralston"],
            inputs=[
                io.Combo.Input("solver", options=list(SOLVERS),
                    tooltip="rf_solver: 2 evaluations a step, order 2. fireflow: 1 a step, order 2, the last midpoint's slope taken again. euler: 1, "
                            "order 1. ralston_3: 3, order 3. The same as in RF Invert."),
                io.Boolean.Input("last_step_euler", default=False, advanced=True,
                    tooltip="On: the last step is one of Euler's, 1 evaluation less and of lower order. Off is exact enough: the rules never ask the "
                            "model at sigma 0."),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustom or SamplerCustomAdvanced.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, solver, last_step_euler):
        return io.NodeOutput(rf_solver(solver, last_step_euler))
