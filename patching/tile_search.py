"""The search behind Attention Tile Search: one plain run that is looked at, then a plan that fits a budget."""

import re
from typing import Any

from ..methods.attention.tile import LAYOUTS, write_plan
from ..methods.measure.tiles import METRICS, Found, TileProbe, density, within_density, within_loss
from .attention import AttentionFeature, PlanState
from .run import attach
from .sampling import Job, Outcome, Progress, sample

NAME = "Attention Tile Search"
MOST = 16  # candidates; each costs a softmax over the sampled scores


class TileProbeFeature(AttentionFeature):
    """The probe on a MODEL; its facts are what it measured."""

    def attached(self, model: Any) -> None:
        """There is no kernel to compile ahead."""

    def facts(self, state: PlanState) -> dict[str, Any]:
        losses = {str(n): {str(k): x for k, x in found.items()} for n, found in state.method.mean().items()}
        return {"declined": dict(state.declined), "frames": state.method.frames, "losses": losses}

    def line(self, facts: dict[str, Any]) -> str:
        return f"measured {len(facts.get('losses', {}))} blocks"


def parse_candidates(text: str) -> tuple[int, ...]:
    """ "1,2,4" -> ascending counts of reference frames >= 1."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d{0,3}", part) for part in parts) or len(set(parts)) > MOST:
        raise ValueError(
            f'candidates: cannot read {text!r}. Write up to {MOST} counts of reference frames like "1,2,4,8".'
        )
    return tuple(sorted({int(part) for part in parts}))


def search(
    model: Any,
    job: Job,
    candidates: tuple[int, ...],
    layout: str = "even",
    metric: str = "rel_mse",
    steps: int = 4,
    threshold: float | None = None,
    budget: float | None = None,
    node: str | None = None,
) -> tuple[str, Outcome, dict[str, Any]]:
    """(plan as JSON, the plain run, report). threshold: the loss under which a block stays; else budget: the mean part
    of the tiles that may be computed. ValueError where the MODEL or the latent has nothing to measure."""
    if layout not in LAYOUTS or metric not in METRICS:
        raise ValueError(f"{NAME}: layout {layout!r} must be of {LAYOUTS}, metric {metric!r} of {METRICS}.")
    total = len(job.sigmas) - 1
    if total < 1:
        raise ValueError(f"{NAME} needs a schedule of at least 2 sigmas, got {len(job.sigmas)}; raise the steps.")
    method = TileProbe(candidates, layout, metric, steps)
    probe = TileProbeFeature(node, NAME, method=method, min_tokens=0)
    outcome = sample(attach(model, probe), job, Progress(total).step)
    facts = next(f["facts"] for f in outcome.record["features"] if f["name"] == NAME)
    found: Found = {int(n): {int(k): x for k, x in row.items()} for n, row in facts["losses"].items()}
    frames = facts["frames"]
    if not found:
        why = "; ".join(reason for reason in facts["declined"] if "not a step" not in reason)
        raise ValueError(f"{NAME} found no attention to measure ({why or 'no image self-attention was met'}). It needs a "
                         "clip of at least 2 latent frames on a model whose token layout is known.")  # fmt: skip
    if threshold is not None:
        plan = within_loss(found, frames, threshold)
    else:
        plan = within_density(found, frames, 1.0 if budget is None else budget)
    report = _report(outcome, found, frames, plan, budget if threshold is None else None)
    return write_plan(plan, frames, layout), outcome, report


def _report(outcome: Outcome, found: Found, frames: int, plan: dict[int, int | None], budget: float | None):
    """A run's record, with what was found in place of the probe's numbers."""
    planned = sum(density(frames, k) for k in plan.values()) / len(plan)
    loss = [found[n][k] if k is not None else 0.0 for n, k in plan.items()]
    facts = {
        "frames": frames,
        "planned_fraction": round(planned, 6),
        "mean_loss": round(sum(loss) / len(loss), 6),
        "worst_loss": round(max(loss), 6),
        "reference_frames": {f"block {n}": "dense" if k is None else k for n, k in plan.items()},
        "loss_by_reference_frames": {
            f"block {n}": ", ".join(f"{k}: {x:.4f}" for k, x in row.items()) for n, row in found.items()
        },
    }
    sparse = sum(k is not None for k in plan.values())
    line = f"{sparse} of {len(plan)} blocks sparse, {planned:.1%} of {frames} x {frames} tiles, loss at most {max(loss):.3g}"
    features = outcome.record["features"]
    entry = {**next(f for f in features if f["name"] == NAME), "facts": facts, "line": line}
    others = [f for f in features if f["name"] != NAME]
    notes = []
    if budget is not None and planned > budget + 1e-9:
        notes.append(f"The sparsest candidates compute {planned:.1%} of the tiles; add smaller candidates for less.")
    return {**outcome.record, "kind": "tile_search", "features": [entry, *others], "notes": notes}
