"""Several MODELs, one job: run in alternation with the same noise, and told apart in numbers. The first is the reference."""

import contextlib
import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from .. import archs
from ..methods.measure.quality import psnr, relative_error, ssim
from ..methods.measure.stack_search import Stack, Tried, front
from .blocks import positions
from .device_name import device_name
from .sampling import Job, Outcome, Progress, metered, sample, start_latent, thin

Decode = Callable[[torch.Tensor], torch.Tensor]  # latent samples -> images [N, H, W, C] in 0..1
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def compare(models: Sequence[Any], job: Job, repeats: int, decode: Decode | None, labels: Sequence[str] = ()):
    """(samples of each, pictures of each or none, report). One short run of each warms up, then a, b, c…, a, b, c…"""
    steps = len(job.sigmas) - 1
    if steps < 1:
        raise ValueError(f"Compare needs a schedule of at least 2 sigmas, got {len(job.sigmas)}; raise the steps.")
    names = labelled(labels, len(models))
    check(models, job)
    models = tuple(metered(m) for m in models)
    progress = Progress(len(models) * (1 + repeats * steps))
    for model in models:
        warm(model, job, progress)
    runs: tuple[list[Outcome], ...] = tuple([] for _ in models)
    for _ in range(repeats):
        for kept, model in zip(runs, models, strict=True):
            outcome = sample(model, job, progress.step)
            if kept:
                kept[0].trace = kept[0].trace or outcome.trace
                outcome.trace, outcome.samples = [], _same(kept[0].samples, outcome.samples)
            kept.append(outcome)
    firsts = [kept[0] for kept in runs]
    pictures = [decode(run.samples).float().cpu().clamp(0, 1) for run in firsts] if decode is not None else []
    sides = [_side(name, model, kept) for name, model, kept in zip(names, models, runs, strict=True)]
    for n, side in enumerate(sides):
        side.update(_against(firsts[0], firsts[n], pictures[:1] + pictures[n : n + 1]))
        side["speedup"] = round(sides[0]["seconds"]["median"] / side["seconds"]["median"], 4)
    last = sides[1]
    report = {
        "kind": "compare",
        "a": sides[0],
        "b": sides[1],
        "models": sides,
        "points": points_of(sides),
        "loss_of": "1 - SSIM" if pictures else "latent error",
        **{key: last[key] for key in ("speedup", "psnr", "ssim", "identical", "latent_error", "per_step_error")},
        "sigmas": [round(float(s), 6) for s in job.sigmas],
        "repeats": repeats,
        "seed": job.noise.seed,
        "cfg": job.cfg,
        "device": device_name(models[0]),
        "notes": _notes(names, runs),
    }
    return [run.samples for run in firsts], pictures, report


class Warmed(Exception):
    """The first step of a run is done."""


def warm(model: Any, job: Job, progress: Progress) -> None:
    """The first step of the job's own schedule: caches may be bound to its number of steps."""

    def stop() -> None:
        progress.step()
        raise Warmed

    with contextlib.suppress(Warmed):
        sample(model, job, stop)


def labelled(labels: Sequence[str], count: int) -> list[str]:
    """A name for each MODEL: those given, then letters. ValueError where two are alike or there are too many."""
    given = [label.strip()[:40] for label in labels]
    if len(given) > count:
        raise ValueError(f"Compare: {len(given)} labels for {count} MODELs. Give as many, separated by commas.")
    names = [label or LETTERS[n] for n, label in enumerate([*given, *[""] * (count - len(given))])]
    if len({*names}) < count:
        raise ValueError(f"Compare: two MODELs have the same label among {', '.join(names)}. Give each its own.")
    return names


def check(models: Sequence[Any], job: Job) -> None:
    """ValueError where two MODELs' latents cannot be compared, before anything is sampled."""
    formats = [type(m.get_model_object("latent_format")).__name__ for m in models]
    shapes = [shapes_of(start_latent(m, job)) for m in models]
    for n in range(1, len(models)):
        if shapes[0] != shapes[n] or formats[0] != formats[n]:
            raise ValueError(
                f"Compare: MODEL a makes {formats[0]} latents of {shapes[0]} and MODEL {LETTERS[n]} {formats[n]} latents of "
                f"{shapes[n]}, which cannot be compared. Connect MODELs that share a VAE, and their latent."
            )


def shapes_of(samples: Any) -> list[list[int]]:
    """Of a latent's tensors: one, or video and audio."""
    return [list(part.shape) for part in samples.unbind()] if samples.is_nested else [list(samples.shape)]


def points_of(sides: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a front chart shows: speed and loss of each, and whether anything beats it in both. Broken runs are left out."""
    told = []
    for side in sides:
        loss = side["latent_error"] if side["ssim"] is None else 1 - side["ssim"]
        if loss is not None:
            told.append(Tried(Stack({side["label"]: {"name": side["label"]}}), side["speedup"], loss))
    leading = front(told)
    return [{"name": t.stack.name, "ratio": t.ratio, "loss": round(t.loss, 6), "front": t in leading} for t in told]


def _against(a: Outcome, b: Outcome, pictures: list[torch.Tensor]) -> dict[str, Any]:
    """How far b is from a."""
    paired = zip(a.trace, b.trace, strict=False)
    return {
        "psnr": _finite(psnr(*pictures), 4) if pictures else None,
        "ssim": _finite(ssim(*pictures)) if pictures else None,
        "identical": _equal(a.samples, b.samples),
        "latent_error": _finite(relative_error(thin(a.samples), thin(b.samples))),
        "per_step_error": [_finite(relative_error(x, y)) for x, y in paired],
    }


def _same(first: Any, again: Any) -> Any:
    """Of equal latents the first: they are not held twice."""
    return first if _equal(first, again) else again


def _equal(a: Any, b: Any) -> bool:
    """Bit for bit, for tensors and nested tensors."""
    parts = [samples.unbind() if samples.is_nested else [samples] for samples in (a, b)]
    return all(torch.equal(x, y) for x, y in zip(*parts, strict=True))


def _finite(value: float, digits: int = 6) -> float | None:
    """JSON has no infinity and no NaN: equal images have no finite PSNR, and a run that broke has no error."""
    return round(value, digits) if math.isfinite(value) else None


def _seconds(runs: list[Outcome]) -> dict[str, float]:
    times = [r.seconds for r in runs]
    return {"median": round(median(times), 6), "min": round(min(times), 6), "max": round(max(times), 6)}


def _side(label: str, model, runs: list[Outcome]) -> dict[str, Any]:
    record = runs[0].record
    features = [f for f in record["features"] if f["name"] != "Meter"]
    facts = [f["facts"] for f in features]
    network = model.get_model_object("diffusion_model")
    arch = archs.find(network)
    stack = len(positions(arch, network)) if arch else None
    skipped = sum(f.get("blocks_skipped", 0) for f in facts)
    computed = [f["blocks_computed"] for f in facts if "blocks_computed" in f]
    total = record["forwards"] * stack if stack else None
    pairs = [f for f in facts if f.get("dense_pairs")]
    peaks = [r.peak_bytes for r in runs if r.peak_bytes is not None]
    return {
        "label": label,
        "seconds": _seconds(runs),
        "steps": record["steps"],
        "evaluations": record["evaluations"],
        "forwards": record["forwards"],
        "blocks_total": total,
        "blocks_computed": computed[0] if computed else total,
        "blocks_skipped": skipped,
        "pairs_fraction": round(sum(f["pairs"] for f in pairs) / sum(f["dense_pairs"] for f in pairs), 6)
        if pairs
        else 1.0,
        "held_bytes": sum(f.get("peak_bytes", 0) for f in facts),
        "peak_bytes": max(peaks, default=None),
        "architecture": record["architecture"],
        "features": features,
    }


def _notes(names: Sequence[str], runs) -> list[str]:
    notes = []
    for label, side in zip(names, runs, strict=True):
        first = side[0].samples
        if any(not _equal(first, r.samples) for r in side[1:]):
            notes.append(f"{label} gave different latents on repeats with the same seed")
        if not thin(first).isfinite().all():
            notes.append(f"the latent of {label} has values that are not finite")
    if len(runs[0]) < 3:
        notes.append(
            f"timed {len(runs[0])} time{'s' * (len(runs[0]) > 1)} each; 3 repeats or more give a steadier ratio"
        )
    return notes
