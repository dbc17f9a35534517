"""Sparse-Linear Attention on a MODEL: whether its weights fit, and fitting them on the user's own job."""

import hashlib
import logging
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from comfy_api.latest import io

from .. import archs
from ..methods.attention.sparse_linear import ORDERS, VARIANTS, SparseLinear
from ..methods.attention.sparse_linear_fit import Recorder
from ..methods.attention.sparse_linear_weights import Projections, fits
from ..methods.measure.quality import relative_error
from . import prewarm
from .attention import AttentionFeature
from .blocks import positions
from .run import attach
from .sampling import Job, Progress, sample, thin
from .sizes import plain_name

log = logging.getLogger("tessera")
NAME = "Sparse-Linear Attention"


@dataclass(frozen=True, eq=False)
class SparseLinearFeature(AttentionFeature):
    """The plan of the node; its weights must be of this model."""

    def check_model(self, arch, diffusion_model) -> None:
        super().check_model(arch, diffusion_model)
        if arch is None or self.method.projections is None:
            return
        weights = self.method.projections
        other = fits(weights, settings_of(self.method), model_of(arch, diffusion_model))
        if other:
            log.warning("%s: %s was made for %s.", self.name, weights.name, ", ".join(other))

    def attached(self, model) -> None:
        prewarm.start(replace(self.method, projections=None), model)

    def line(self, facts: dict[str, Any]) -> str:
        weights = self.method.projections
        told = super().line(facts)
        if self.inactive or weights is None or not facts or not facts["calls"]:
            return told
        fitted = len(weights.blocks if self.blocks is None else self.blocks & {*weights.blocks})
        return f"{told}; linear branch in {fitted} block{'s' if fitted != 1 else ''}"


def sparse_inputs() -> list[Any]:
    """The settings of the method, shared with its calibration."""
    return [
        io.Float.Input("topk", default=0.5, min=0.01, max=1.0, step=0.01, round=0.001,
            tooltip="Share of image key blocks that each block of queries attends to, 0 to 1. Higher is closer to the plain picture and "
                    "slower; 0.3 to 0.5 without weights, 0.1 to 0.3 with them."),
        io.Combo.Input("variant", options=list(VARIANTS),
            tooltip="With weights, what the linear branch covers: main, all keys (TurboWan); sla1, the blocks that are not attended to; "
                    "paper, as sla1 without the negligible ones. It must be the variant that the weights were made for."),
        io.Float.Input("negligible", default=0.1, min=0.0, max=0.9, step=0.01, round=0.001, advanced=True,
            tooltip="Variant paper: share of key blocks of the lowest scores that the linear branch leaves out too, 0 to 0.9."),
        io.Combo.Input("feature_map", options=["softmax", "elu1", "relu"], advanced=True,
            tooltip="Features of the linear branch: softmax over the head (as in SLA), elu + 1, or relu. As the weights were made for."),
        io.Combo.Input("block_q", options=["auto", "16", "32", "64", "128"], advanced=True,
            tooltip="Queries of a block, tokens. Larger is faster on a GPU, smaller chooses more finely. auto: 64 from 4,096 image tokens on, "
                    "fewer below."),
        io.Combo.Input("block_k", options=["auto", "16", "32", "64"], advanced=True,
            tooltip="Keys of a block, tokens, as block_q. Weights work best with the size that they were made for: 64 for TurboWan."),
        io.Boolean.Input("keep_own", default=True, advanced=True,
            tooltip="A block of queries always attends to its own tokens, counted towards topk. Off for TurboWan, which was trained "
                    "without."),
        io.Combo.Input("order", options=list(ORDERS), advanced=True,
            tooltip="tiles: a block is a compact patch of the picture or clip; rows: consecutive tokens, as TurboWan was trained; auto: rows "
                    "where a block holds a whole row of tokens, else tiles."),
    ]  # fmt: skip


def block_size(choice: str) -> int:
    """Of the inputs block_q and block_k: 0 for auto."""
    return 0 if choice == "auto" else int(choice)


def settings_of(method: SparseLinear) -> dict[str, Any]:
    """The settings that projections depend on."""
    kept = asdict(replace(method, projections=None))
    del kept["projections"]
    if method.variant != "paper":
        del kept["negligible"]
    return kept


def model_of(arch: archs.Arch, diffusion_model: Any) -> dict[str, Any]:
    """What projections are bound to: the family, its number of blocks, and its tensors' names and shapes."""
    shapes = sorted((plain_name(name), tuple(p.shape)) for name, p in diffusion_model.named_parameters())
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()
    return {"architecture": arch.name, "blocks": len(positions(arch, diffusion_model)), "shapes": digest}


def patch(model, node: str | None, method: SparseLinear, where: dict[str, Any]):
    """The MODEL with Sparse-Linear Attention."""
    return attach(model, SparseLinearFeature(node, NAME, method=method, **where))


@dataclass
class Calibration:
    """What a calibration found."""

    projections: Projections
    blocks: list[dict[str, Any]]  # block, calls, rows, before and after: relative errors of the attention output
    record: dict[str, Any]  # of the run
    errors: tuple[float, float] | None  # of the final latent, sparse alone and with the branch; None: not tried


def captured_steps(steps: int, captures: int) -> frozenset[int]:
    """`captures` steps of a run, evenly spread, the first and the last among them."""
    count = min(steps, captures)
    return frozenset(round(i * (steps - 1) / max(1, count - 1)) for i in range(count))


def calibrate(
    model,
    job: Job,
    node: str | None,
    method: SparseLinear,
    where: dict[str, Any],
    captures: int,
    ridge: float,
    verify: bool = True,
) -> Calibration:
    """Samples the job once with dense attention, and fits a projection for every block that met it. verify: samples it
    twice more, to tell what the projections do to the final latent. ValueError where nothing was captured."""
    steps = len(job.sigmas) - 1
    if steps < 1:
        raise ValueError(f"Calibration needs a schedule of at least 2 sigmas, got {len(job.sigmas)}; raise the steps.")
    recorder = Recorder(replace(method, projections=None), captured_steps(steps, captures))
    feature = AttentionFeature(node, "Calibrate Sparse-Linear Attention", method=recorder, **where)
    progress = Progress(steps * (3 if verify else 1))
    outcome = sample(attach(model, feature), job, progress.step)
    if not recorder.kept:
        facts = next(f["facts"] for f in outcome.record["features"] if f["name"] == feature.name)
        why = ", ".join(facts.get("declined", {})) or feature.inactive or "no image self-attention reached it"
        raise ValueError(
            f"Calibration captured nothing: {why}. Widen the steps and blocks, lower min_tokens or topk, or use a larger latent."
        )
    blocks, told = recorder.fitted(ridge)
    broken = [n for n, pair in blocks.items() if not all(x.isfinite().all() for x in pair)]
    if broken or not all(math.isfinite(row["before"]) for row in told):
        raise ValueError(
            f"Calibration met values that are not finite (blocks {broken}); check the MODEL in a plain run."
        )
    diffusion_model = model.get_model_object("diffusion_model")
    arch = archs.find(diffusion_model)
    assert arch is not None
    bound = model_of(arch, diffusion_model)
    pairs = {n: (weight.to(torch.float32), bias.to(torch.float32)) for n, (weight, bias) in blocks.items()}
    made = Projections("", pairs, settings_of(method), bound)
    errors = None
    if verify:
        want = thin(outcome.samples)
        alone, fitted = (
            relative_error(want, thin(sample(patch(model, None, tried, where), job, progress.step).samples))
            for tried in (replace(method, projections=None), replace(method, projections=made))
        )
        errors = alone, fitted
    return Calibration(made, told, outcome.record, errors)
