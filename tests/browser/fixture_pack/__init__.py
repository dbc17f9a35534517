"""Nodes for the browser tests: one that sends and returns whatever record a test writes, one that makes conditioning."""

import json
import time

import torch
from comfy_api.latest import ComfyExtension, io
from server import PromptServer


class TesseraTestRecord(io.ComfyNode):
    """Sends `event` as tessera.run, its null nodes filled with this node's id, and returns `report` as its output."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraTestRecord",
            display_name="Test Record",
            category="test",
            is_output_node=True,
            inputs=[io.String.Input("event", default=""), io.String.Input("report", default="")],
            outputs=[],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, event, report):
        return time.time()  # runs each time, never from the server's cache

    @classmethod
    def execute(cls, event, report):
        if event:
            record = json.loads(event)
            for feature in record.get("features", []):
                feature["node"] = feature.get("node") or cls.hidden.unique_id
            server = PromptServer.instance
            server.send_sync("tessera.run", record, server.client_id)
        return io.NodeOutput(ui={"tessera_report": [json.loads(report)]} if report else None)


class TestConditioning(io.ComfyNode):
    """Random text features [1, tokens, width] and a pooled vector [1, pooled] for a tiny model."""

    @classmethod
    def define_schema(cls):
        sizes = {"tokens": 8, "width": 96, "pooled": 64}
        return io.Schema(
            node_id="TestConditioning",
            category="test",
            inputs=[io.Int.Input(name, default=size, max=8192) for name, size in sizes.items()],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, tokens, width, pooled):
        generator = torch.Generator().manual_seed(0)
        vector = torch.randn(1, pooled, generator=generator)
        return io.NodeOutput([[torch.randn(1, tokens, width, generator=generator), {"pooled_output": vector}]])


class TestExtension(ComfyExtension):
    async def get_node_list(self):
        return [TesseraTestRecord, TestConditioning]


async def comfy_entrypoint():
    return TestExtension()
