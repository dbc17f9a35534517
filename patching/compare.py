"""Two MODELs, one job: run in alternation with the same noise, and told apart in numbers."""

import contextlib
import math
import platform
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from .. import archs
from ..methods.measure.quality import psnr, relative_error, side_by_side, ssim
from .blocks import positions
from .sampling import Job, Outcome, Progress, metered, sample, start_latent, thin

Decode = Callable[[torch.Tensor], torch.Tensor]  # latent samples -> images [N, H, W, C] in 0..1


def compare(models: tuple[Any, Any], job: Job, repeats: int, decode: Decode | None):
    """(samples a, samples b, images side by side or one black pixel, report). One short run of each warms up, then
    a, b, a, b…"""
    steps = len(job.sigmas) - 1
    if steps < 1:
        raise ValueError(f"Compare needs a schedule of at least 2 sigmas, got {len(job.sigmas)}; raise the steps.")
    check(models, job)
    models = tuple(metered(m) for m in models)
    progress = Progress(2 + 2 * repeats * steps)
    for model in models:
        warm(model, job, progress)
    runs: tuple[list[Outcome], list[Outcome]] = ([], [])
    for _ in range(repeats):
        for kept, model in zip(runs, models, strict=True):
            outcome = sample(model, job, progress.step)
            if kept:
                kept[0].trace = kept[0].trace or outcome.trace
                outcome.trace = []
            kept.append(outcome)
    a, b = runs[0][0], runs[1][0]
    images, quality = torch.zeros(1, 1, 1, 3), {"psnr": None, "ssim": None}
    if decode is not None:
        pictures = [decode(run.samples).float().cpu().clamp(0, 1) for run in (a, b)]
        images = side_by_side(*pictures)
        quality = {"psnr": _finite(psnr(*pictures), 4), "ssim": _finite(ssim(*pictures))}
    report = {
        "kind": "compare",
        "a": _side("a", models[0], runs[0]),
        "b": _side("b", models[1], runs[1]),
        "speedup": round(_seconds(runs[0])["median"] / _seconds(runs[1])["median"], 4),
        **quality,
        "identical": _equal(a.samples, b.samples),
        "latent_error": _finite(relative_error(thin(a.samples), thin(b.samples))),
        "per_step_error": [_finite(relative_error(x, y)) for x, y in zip(a.trace, b.trace, strict=False)],
        "sigmas": [round(float(s), 6) for s in job.sigmas],
        "repeats": repeats,
        "seed": job.noise.seed,
        "cfg": job.cfg,
        "device": _device(models[0]),
        "notes": _notes(runs),
    }
    return a.samples, b.samples, images, report


class Warmed(Exception):
    """The first step of a run is done."""


def warm(model: Any, job: Job, progress: Progress) -> None:
    """The first step of the job's own schedule: caches may be bound to its number of steps."""

    def stop() -> None:
        progress.step()
        raise Warmed

    with contextlib.suppress(Warmed):
        sample(model, job, stop)


def check(models: tuple[Any, Any], job: Job) -> None:
    """ValueError where the two MODELs' latents cannot be compared, before anything is sampled."""
    formats = [type(m.get_model_object("latent_format")).__name__ for m in models]
    shapes = [shapes_of(start_latent(m, job)) for m in models]
    if shapes[0] != shapes[1] or formats[0] != formats[1]:
        raise ValueError(
            f"Compare: MODEL a makes {formats[0]} latents of {shapes[0]} and MODEL b {formats[1]} latents of "
            f"{shapes[1]}, which cannot be compared. Connect two MODELs that share a VAE, and their latent."
        )


def shapes_of(samples: Any) -> list[list[int]]:
    """Of a latent's tensors: one, or video and audio."""
    return [list(part.shape) for part in samples.unbind()] if samples.is_nested else [list(samples.shape)]


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
    arch = archs.find(model.model.diffusion_model)
    stack = len(positions(arch, model.model.diffusion_model)) if arch else None
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


def _device(model) -> str:
    device = model.load_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return f"{device.type}: {name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as rows:
            names = [row.split(":", 1)[1].strip() for row in rows if row.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def _notes(runs) -> list[str]:
    notes = []
    for label, side in zip("ab", runs, strict=True):
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
