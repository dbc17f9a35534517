from comfy_api.latest import io

from ...patching.report import latest_record


class RunReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraRunReport",
            display_name="Run Report",
            category="Tessera/measure",
            description="What the Tessera nodes on a MODEL did in the run that made this latent: steps and blocks "
            "skipped, attention pairs computed, the masks of sparse attention, bytes held, what was declined and why.",
            search_aliases=[
                "stats",
                "cache hits",
                "skipped steps",
                "benchmark",
                "debug",
                "sparse mask",
                "attention map",
            ],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that the sampler used, after the last Tessera node."),
                io.Latent.Input(
                    "latent",
                    tooltip="The sampler's output. It passes through unchanged; the link makes "
                    "the report wait for the run.",
                ),  # fmt: skip
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The same latent."),
                io.Custom("TESSERA_REPORT").Output(display_name="report", tooltip="The facts of the run, as JSON."),
            ],
        )

    @classmethod
    def execute(cls, model, latent):
        record = latest_record(model, latent["samples"], masks=True)
        return io.NodeOutput(latent, record, ui={"tessera_report": [record]})
