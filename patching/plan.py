"""Everything that will act on a MODEL, ours and others', told before anything is sampled."""

from dataclasses import asdict
from typing import Any

from .. import archs
from . import plan_foreign, plan_ours
from .blocks import positions
from .plan_words import STAGES, Row
from .run import features_of

TITLES = {
    "declined": "Declined",
    "conflicts": "In conflict",
    "refused": "Refused: a run on this MODEL stops at its start",
}


def plan(model: Any, latent: dict[str, Any] | None = None) -> dict[str, Any]:
    """JSON-ready: `rows` in the order of action, `declined`, `conflicts`, `refused`, and the whole as lines of text."""
    diffusion_model = model.get_model_object("diffusion_model")
    arch = archs.find(diffusion_model)
    features = features_of(model.model_options)
    rows = ordered(plan_ours.rows(features, model), plan_foreign.rows(model))
    grid = plan_ours.token_grid(model, latent)
    report = {
        "kind": "plan",
        "architecture": arch.name if arch else archs.class_name(diffusion_model),
        "known": arch is not None,
        "blocks": len(positions(arch, diffusion_model)) if arch else None,
        "grid": None if grid is None else list(grid),
        "limits": dict(arch.limits) if arch else {},
        "rows": [{"order": i + 1, **_told(row)} for i, row in enumerate(rows)],
        "declined": plan_ours.declines(features, model, latent),
        "refused": plan_ours.refused(features, model),
        "conflicts": plan_foreign.conflicts(model, features),
    }
    return {**report, "headline": headline(report), "lines": lines(report)}


def ordered(ours: list[Row], theirs: list[Row]) -> list[Row]:
    """By stage. At a stage wrappers of others stand around ours; their attention override serves what ours leave."""
    made = []
    for stage in STAGES:
        mine, others = ([row for row in part if row.stage == stage] for part in (ours, theirs))
        made += [*mine, *others] if stage in ("attention", "blocks") else [*others, *mine]
    return made


def _told(row: Row) -> dict[str, Any]:
    return {**asdict(row), "when": STAGES[row.stage]}


def headline(report: dict[str, Any]) -> str:
    acting = [row for row in report["rows"] if row["state"] == "acts"]
    ours = sum(row["owner"] == "Tessera" and row["node"] is not None for row in acting)
    others = sum(row["owner"] != "Tessera" for row in acting)
    said = f"{_count(ours, 'Tessera node')} and {_count(others, 'patch', 'patches')} of others will act on this {report['architecture']}"
    idle = len(report["rows"]) - len(acting)
    said += f", {idle} without effect" if idle else ""
    parts = ((part, len(report[part])) for part in ("declined", "conflicts", "refused"))
    return said + "".join(f", {many} {part}" for part, many in parts if many)


def _count(n: int, noun: str, plural: str = "") -> str:
    return f"{n} {noun if n == 1 else plural or noun + 's'}"


def lines(report: dict[str, Any]) -> list[str]:
    """Readable text, in the order of action."""
    blocks = f", {report['blocks']} blocks" if report["blocks"] else ""
    known = "" if report["known"] else " (unknown: its blocks and token layout are not known to Tessera)"
    grid = f", {' x '.join(map(str, report['grid']))} image tokens" if report["grid"] else ""
    made = [headline(report), f"Model: {report['architecture']}{known}{blocks}{grid}"]
    made += [f"Here nodes on {what} cannot act: {why}" for what, why in report["limits"].items()]
    for stage, when in STAGES.items():
        rows = [row for row in report["rows"] if row["stage"] == stage]
        if rows:
            made += [f"{when.capitalize()}:", *(f"  {row['order']}. {_row(row)}" for row in rows)]
    if not report["rows"]:
        made.append("Nothing is on this MODEL: it runs as it was loaded.")
    for part, title in TITLES.items():
        made += [f"{title}:", *(f"  - {sentence}" for sentence in report[part])] if report[part] else []
    return made


def _row(row: dict[str, Any]) -> str:
    node = f", node {row['node']}" if row["node"] is not None else ""
    where = f"; blocks {row['blocks'] or 'none'} of {row['of']}" if row["of"] else ""
    when = ""
    if row["percent"] is not None and row["percent"] != [0.0, 1.0]:
        (start, end), (high, low) = row["percent"], row["sigma"]
        when = f"; from {start:.0%} to {end:.0%} of the schedule (sigma {min(high, 9999):.4g} to {low:.4g})"
    state = "" if row["state"] == "acts" else f" [{row['state']}: {row['why']}]"
    return f"{row['name']} ({row['owner']}{node}): {row['does']}{where}{when}{state}"
