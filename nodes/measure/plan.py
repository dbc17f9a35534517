from comfy_api.latest import io

from ...patching.plan import plan


class Plan(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraPlan",
            display_name="Plan",
            category="Tessera/measure",
            description="Shows everything that will act on a MODEL before anything is sampled, ours and other packs', in the order "
            "of action: attention with its blocks and noise range, caches, LoRA, quantized weights, torch.compile, context "
            "windows; what will be declined on this model and why, and what is in conflict.",
            search_aliases=["what is patched", "list patches", "conflicts", "compatibility", "debug model", "inspect model",
                            "order of patches", "why does it do nothing"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that goes to the sampler. It passes through unchanged."),
                io.Latent.Input("latent", optional=True,
                    tooltip="Start latent to come, to tell what declines pictures of this size. Nothing is computed with it."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The same MODEL, unchanged."),
                io.String.Output(display_name="text", tooltip="The plan as text, one line for each patch in the order of action."),
                io.Custom("TESSERA_REPORT").Output(display_name="report", tooltip="The plan as JSON; also in the run's history."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, latent=None):
        report = plan(model, latent)
        return io.NodeOutput(model, "\n".join(report["lines"]), report, ui={"tessera_report": [report]})
