"""One sampling run through a MODEL, during which sampled queries tell how much attention mass a sparse pattern keeps."""

from dataclasses import dataclass
from typing import Any

import torch

from ..archs import Layout
from ..methods.measure.attention_recall import PLACES, AttentionRecall, Found
from ..methods.measure.heat_map import heat_map
from ..methods.measure.patterns import PATTERNS, Curve, Settings
from .attention import AttentionFeature
from .plan_words import ranges
from .run import attach, features_of
from .sampling import Job, Progress, sample

LADDER = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)  # densities that every report tells
NAME = "Attention Probe"


@dataclass(frozen=True)
class Probe:
    """wanted: recall to reach, 0..1. steps: how many are measured, spread over the schedule. samples: queries of each
    call. blocks None: all."""

    settings: Settings
    wanted: float = 0.9
    steps: int = 4
    samples: int = 128
    seed: int = 0
    blocks: frozenset[int] | None = None


def spread(steps: int, wanted: int) -> list[int]:
    """`wanted` of the steps 0 .. steps - 1 with the first and the last, evenly; all where there are fewer."""
    return sorted({int(i) for i in torch.linspace(0, steps - 1, min(steps, wanted)).round()})


def probe(model: Any, job: Job, asked: Probe) -> tuple[torch.Tensor, dict[str, Any], float, int]:
    """(map [1, H, W, 3], report, density for the wanted recall, the same as a number). The MODEL keeps nothing."""
    steps = len(job.sigmas) - 1
    if steps < 1:
        raise ValueError(f"{NAME} needs a schedule of at least 2 sigmas, got {len(job.sigmas)}; raise the steps.")
    found = Found(frozenset(spread(steps, asked.steps)))
    method = AttentionRecall(asked.settings, found, asked.samples, asked.seed)
    feature = AttentionFeature(None, NAME, method=method, blocks=asked.blocks, min_tokens=0)
    sample(attach(model, feature), job, Progress(steps).step)
    if found.curve is None or found.layout is None or not found.sums:
        why = "".join(f"; {n} calls: {reason}" for reason, n in sorted(found.missed.items()))
        raise ValueError(
            f"{NAME} met no image self-attention of a known layout{why}. Check the list of blocks, and that no cache "
            f"skips the measured steps."
        )
    report = _report(found, found.curve, found.layout, asked, job)
    report["notes"] += [
        f"{held.name} acted on this MODEL; connect the plain MODEL to measure its own attention"
        for held in features_of(model.model_options)
        if not held.inactive
    ]
    density, value = _suggested(report["suggested"], found.curve)
    return _picture(report), report, density, value


def _suggested(entry: dict[str, Any] | None, curve: Curve) -> tuple[float, int]:
    if entry is None:
        return curve.densities[-1], curve.amounts[-1]
    return entry["density"], entry["amount"]


def _entry(curve: Curve, recall: torch.Tensor, at: int) -> dict[str, float]:
    return {
        "value": curve.values[at],
        "density": round(curve.densities[at], PLACES),
        "amount": curve.amounts[at],
        "recall": round(float(recall[at]), PLACES),
    }


def _needed(curve: Curve, recall: torch.Tensor, wanted: float) -> dict[str, float] | None:
    """The smallest setting that reaches the wanted recall; None where none does."""
    reach = [i for i, found in enumerate(recall.tolist()) if round(found, PLACES) >= wanted]
    return _entry(curve, recall, reach[0]) if reach else None


def _report(found: Found, curve: Curve, layout: Layout, asked: Probe, job: Job) -> dict[str, Any]:
    curves = found.curves()
    steps, blocks = sorted(found.steps), sorted({block for block, _ in curves})
    chosen = curve.at(asked.settings.density)
    by_block = []
    for block in blocks:
        own = {step: curves[block, step] for step in steps if (block, step) in curves}
        mean = torch.stack([*own.values()]).mean(0)
        by_block.append(
            {
                "block": block,
                "recall": round(float(mean[chosen]), PLACES),
                "by_step": [round(float(own[s][chosen]), PLACES) if s in own else None for s in steps],
                "suggested": _needed(curve, mean, asked.wanted),
            }
        )
    overall = torch.stack([*curves.values()]).mean(0)
    report = {
        "kind": "probe",
        "pattern": asked.settings.pattern,
        "setting": PATTERNS[asked.settings.pattern],
        "block": asked.settings.block,
        "grid": list(layout.grid),
        "tokens": layout.image.stop - layout.image.start,
        "others": layout.others,
        "queries": len(curve.queries),
        "wanted": asked.wanted,
        "chosen": _entry(curve, overall, chosen),
        "suggested": _needed(curve, overall, asked.wanted),
        "ladder": [_entry(curve, overall, curve.at(density)) for density in LADDER],
        "steps": steps,
        "sigmas": [round(float(job.sigmas[s]), PLACES) for s in steps],
        "blocks": by_block,
        "enough": ranges([b["block"] for b in by_block if b["recall"] >= asked.wanted]),
        "seed": asked.seed,
        "notes": [f"{n} calls not measured: {why}" for why, n in sorted(found.missed.items())],
    }
    report["lines"] = _lines(report)
    return report


def _setting(report: dict[str, Any], entry: dict[str, Any] | None) -> str:
    """ "density 0.3", or "radius 12, density 0.227"."""
    if entry is None:
        return "no setting"
    if report["setting"] == "density":
        return f"density {entry['value']:g}"
    return f"{report['setting']} {entry['value']:g}, density {entry['density']:.3f}"


def _lines(report: dict[str, Any]) -> list[str]:
    chosen, wanted = report["chosen"], f"{report['wanted']:g}"
    lines = [f"{_setting(report, chosen)} keeps {chosen['recall']:.3f} of the attention mass"]
    if report["suggested"] is None:
        most = report["ladder"][-1]["recall"]
        lines.append(f"no setting keeps {wanted}: {most:.3f} is the most")
    else:
        lines.append(f"for {wanted} set {_setting(report, report['suggested'])}")
    needs = [b for b in report["blocks"] if b["suggested"] is not None]
    if needs and len(report["blocks"]) > 1:
        low, high = (pick(needs, key=lambda b: b["suggested"]["density"]) for pick in (min, max))
        if low["suggested"]["density"] < high["suggested"]["density"]:
            lines.append(
                f"block {low['block']} needs least ({_setting(report, low['suggested'])}), block {high['block']} most "
                f"({_setting(report, high['suggested'])})"
            )
    if report["enough"]:
        lines.append(f"blocks that keep {wanted} with {_setting(report, chosen)}: {report['enough']}")
    return lines


def _picture(report: dict[str, Any]) -> torch.Tensor:
    """Rows are blocks, columns the measured steps and their mean; at the right what each block needs."""
    pattern, steps = report["pattern"], report["steps"]
    grid = " x ".join(str(n) for n in report["grid"])
    of = f" of {report['block']} tokens" if pattern == "blocks" else ""
    title = [
        f"Attention mass kept: {pattern}{of}, {_setting(report, report['chosen'])}",
        f"grid {grid}, {report['others']} other tokens, {report['queries']} queries of each call",
        *report["lines"][:2],
    ]
    rows = [
        (
            str(b["block"]),
            [*b["by_step"], b["recall"]],
            "-" if b["suggested"] is None else f"{b['suggested']['value']:g}",
        )
        for b in report["blocks"]
    ]
    every = [[b["by_step"][i] for b in report["blocks"] if b["by_step"][i] is not None] for i in range(len(steps))]
    mean = [sum(held) / len(held) if held else None for held in every]
    whole = report["suggested"]
    rows.append(("all", [*mean, report["chosen"]["recall"]], "-" if whole is None else f"{whole['value']:g}"))
    last = f"{report['setting']} for {report['wanted']:g}"
    return heat_map(title, "block / step", [*(str(s) for s in steps), "mean"], rows, last)
