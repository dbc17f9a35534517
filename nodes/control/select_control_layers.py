from comfy_api.latest import io

from ...patching.control_relevance import RelevanceSocket, keep_layers


class SelectControlLayers(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraSelectControlLayers",
            display_name="Select Control Layers",
            category="Tessera/control",
            description="Keeps the residuals of a ControlNet that matter most, as Control Relevance ranked them, and drops the others. Blocks "
            "of the ControlNet that nothing needs any more are not computed.",
            search_aliases=["RelaCtrl", "ControlNet block weights", "prune ControlNet", "faster ControlNet", "top-k control layers"],
            inputs=[
                io.ControlNet.Input("control_net", tooltip="The ControlNet that was measured. It is left as it is."),
                RelevanceSocket.Input("relevance", tooltip="From Control Relevance."),
                io.Int.Input("keep", default=11, min=1, max=1000,
                    tooltip="Residuals to keep, the best ranked. All or more is the ControlNet as it is; fewer control less. Faster by the blocks of the "
                            "ControlNet after the last kept one."),
            ],
            outputs=[io.ControlNet.Output(tooltip="The ControlNet with these residuals alone. Connect it to Apply ControlNet.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, control_net, relevance, keep):
        net, lines = keep_layers(control_net, relevance, keep)
        return io.NodeOutput(net, ui={"tessera_report": [{"kind": "lines", "lines": lines}]})
