import json

from comfy_api.latest import io

from ...methods.measure.control_change import METRICS
from ...patching.control_relevance import NAME, Asked, Control, RelevanceSocket, job_of, lines_of, measure


class ControlRelevance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraControlRelevance",
            display_name="Control Relevance",
            category="Tessera/measure",
            description="Tells which residuals of a ControlNet matter for your picture: samples with all of them, then without each, and "
            "ranks them by how much changes. Select Control Layers keeps the best. A stand-in without labels for RelaCtrl's score.",
            search_aliases=["RelaCtrl", "ControlNet block weights", "layer relevance", "ControlNet profiler", "control relevance score",
                            "prune ControlNet"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that the ControlNet is for. It is left as it is."),
                io.Conditioning.Input("positive", tooltip="A prompt like those to come, before the ControlNet is applied. Earlier ControlNets on it stay."),
                io.Conditioning.Input("negative", tooltip="Negative prompt; unused at cfg 1."),
                io.ControlNet.Input("control_net", tooltip="Any ControlNet, control LoRA or T2I adapter of ComfyUI's own loader."),
                io.Image.Input("image", tooltip="The condition, like those to come."),
                io.Latent.Input("latent", tooltip="Start latent; its size is that of the picture to come."),
                io.Float.Input("strength", default=1.0, min=0.0, max=10.0, step=0.05, round=0.001,
                    tooltip="Strength of the ControlNet, as in its apply node. Higher shows small residuals more clearly."),
                io.Int.Input("steps", default=8, min=4, max=20,
                    tooltip="Sampler steps of each run. More are nearer to the picture to come and take longer. Unused where sigmas are connected."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="Guidance. 1 evaluates the positive prompt alone, in half the time."),
                io.Combo.Input("metric", options=list(METRICS),
                    tooltip="Change of the finished picture: relative distance of latents, one minus their cosine, or one minus the F1 of edges (of the "
                            "decoded picture where a VAE is connected, else of the latent), which is nearest to what an edge control is for."),
                io.Int.Input("seeds", default=2, min=1, max=16,
                    tooltip="Seeds that all is run with. More are steadier and take longer: each costs a run for each residual and two more."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFF, control_after_generate=False,
                    tooltip="The first seed; the others follow it."),
                io.Int.Input("keep", default=11, min=1, max=1000,
                    tooltip="Residuals that the closing run keeps, to tell what Select Control Layers with the same number loses and saves."),
                io.Vae.Input("vae", optional=True, tooltip="For ControlNets that encode their image, and for edge_f1."),
                io.Sampler.Input("sampler", optional=True, tooltip="The sampler to come; Euler where nothing is connected."),
                io.Sigmas.Input("sigmas", optional=True, tooltip="The schedule to come, in place of steps on the simple schedule."),
            ],
            outputs=[
                RelevanceSocket.Output(display_name="relevance", tooltip="Score and rank of each residual. Connect it to Select Control Layers."),
                io.Image.Output(display_name="chart", tooltip="A row for each residual: its change with each seed as a share of the largest, mean and rank."),
                io.String.Output(display_name="json", tooltip="All numbers, as JSON."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, positive, negative, control_net, image, latent, strength, steps, cfg, metric, seeds, seed, keep,
                vae=None, sampler=None, sigmas=None):  # fmt: skip
        job = job_of(model, positive, negative, latent, steps, seed, cfg, sampler, sigmas)
        control = Control(control_net, image, vae, strength)
        relevance, picture = measure(model, job, control, Asked(metric, seeds, keep))
        lines = lines_of(relevance)
        feature = {"name": NAME, "node": cls.hidden.unique_id, "facts": relevance["kept"], "line": lines[0]}
        report = {"kind": "lines", "lines": lines, "features": [feature]}
        return io.NodeOutput(
            relevance, picture, json.dumps(relevance, allow_nan=False), ui={"tessera_report": [report]}
        )
