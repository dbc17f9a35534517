import dataclasses
from math import isfinite
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ...methods.attention.sparse_linear import SparseLinear
from ...methods.attention.sparse_linear_weights import write
from ...methods.files.shelf import free, plain_name
from ...patching.sampling import Job
from ...patching.sparse_linear import block_size, calibrate, patch, sparse_inputs
from ...patching.widgets import where, where_inputs

SUFFIX = ".safetensors"


class CalibrateSparseLinearAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraCalibrateSparseLinearAttention",
            display_name="Calibrate Sparse-Linear Attention",
            category="Tessera/surgery",
            description="Fits the linear branch of Sparse-Linear Attention on your own job, in closed form and without "
            "training: samples once with dense attention, solves for one small matrix a block, and writes a file that "
            "Sparse-Linear Attention loads.",
            search_aliases=["SLA", "calibration", "fine-tune", "proj_l", "ridge regression", "TurboDiffusion"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to calibrate for, without Sparse-Linear Attention."),
                io.Conditioning.Input("positive", tooltip="Prompt of the job; choose one like those that you will use."),
                io.Conditioning.Input("negative", tooltip="Negative prompt; unused at cfg 1."),
                io.Latent.Input("latent", tooltip="Start latent; its size sets the size of the picture. Several in a batch give more captures."),
                io.Noise.Input("noise", tooltip="Noise, for example from RandomNoise."),
                io.Sampler.Input("sampler", tooltip="Sampler, for example from KSamplerSelect."),
                io.Sigmas.Input("sigmas", tooltip="Noise schedule, for example from BasicScheduler."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="Guidance of the job. Above 1 the negative prompt's calls are captured too."),
                *sparse_inputs(),
                io.Int.Input("captures", default=64, min=1, max=10000, advanced=True,
                    tooltip="Steps that are captured, evenly spread over the schedule. Fewer are quicker and fit less well."),
                io.Float.Input("ridge", default=0.1, min=0.0, max=100.0, step=0.01, round=0.00001, advanced=True,
                    tooltip="Pull of the fit towards zero, relative to the branch's size. Higher is more careful with few captures."),
                io.String.Input("filename", default="sparse_linear",
                    tooltip="Name of the file in models/model_patches, without folder; a number is added, nothing is overwritten."),
                io.Boolean.Input("verify", default=True, advanced=True,
                    tooltip="Samples the job twice more, sparse alone and with the fitted branch, and tells both errors of the final latent."),
                *where_inputs(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The MODEL with Sparse-Linear Attention and the fitted weights."),
                io.String.Output(display_name="path", tooltip="The file that was written."),
                io.Custom("TESSERA_REPORT").Output(display_name="report", tooltip="Errors of the attention output before and after, by block, as JSON."),
            ],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, positive, negative, latent, noise, sampler, sigmas, cfg, topk, variant, negligible,
                feature_map, block_q, block_k, keep_own, order, captures, ridge, filename, verify, **shared):  # fmt: skip
        folder = Path(folder_paths.get_folder_paths("model_patches")[0])
        name = plain_name(filename, SUFFIX, "filename")
        numbers = block_size(block_q), block_size(block_k)
        method = SparseLinear(topk, variant, negligible, feature_map, *numbers, keep_own, order)
        job = Job(positive, negative, latent, sampler, sigmas, noise, cfg)
        node, acts = cls.hidden.unique_id, where(**shared)
        found = calibrate(model, job, node, method, acts, captures, ridge, verify)
        path = free(folder, name, SUFFIX)
        write(path, found.projections)
        fitted = dataclasses.replace(method, projections=dataclasses.replace(found.projections, name=path.name))
        report = {**found.record, "calibration": told(path.name, found), "notes": notes(path.name, found)}
        return io.NodeOutput(patch(model, node, fitted, acts), str(path), report, ui={"tessera_report": [report]})


def told(name, found):
    alone, fitted = (None if e is None or not isfinite(e) else round(e, 6) for e in found.errors or (None, None))
    return {"file": name, "blocks": found.blocks, "latent_error_sparse": alone, "latent_error": fitted}


def notes(name, found):
    """Lines for the report's panel."""
    lines = [f"{name}: relative error of the attention output, sparse alone -> with the linear branch"]
    lines += [f"block {b['block']}: {b['before']:.4f} -> {b['after']:.4f}" for b in found.blocks]
    if found.errors:
        lines.insert(0, f"error of the final latent: {found.errors[0]:.4f} -> {found.errors[1]:.4f}")
        if not found.errors[1] < found.errors[0]:
            lines.insert(
                1, "The branch does not bring this job closer: raise ridge, choose another variant or leave it off."
            )
    return lines
