"""What Profile Model tells of its measurements: shares, the bottleneck, and which of our nodes act on it here."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from .. import archs
from ..methods.measure.bars import bars
from ..methods.measure.profile import Measured, bottleneck, shares
from .blocks import positions
from .profile import Asked, Found
from .profile_advice import advice
from .profile_meter import KINDS, Cell, Meter
from .run import features_of
from .sampling import Job, start_latent

FOLDER = "tessera_model_profiles"  # below ComfyUI's output folder
TERA, GIB = 1e12, 2**30
NAMES = {
    "outside": "outside the network",
    "profiler": "the profiler itself",
    "other": "other (elementwise, RoPE, gates)",
}
MOST = 16  # attention lengths told


def report(model: Any, job: Job, asked: Asked, found: Found) -> dict[str, Any]:
    """JSON-ready; its keys are in the help page."""
    arch, network = found.counted.arch, model.get_model_object("diffusion_model")
    stack = positions(arch, network) if arch is not None else []
    told = {
        "kind": "profile", "mode": asked.mode, "counted": found.how,
        "architecture": arch.name if arch else archs.class_name(network), "known": arch is not None, "blocks": len(stack),
        "device": device_of(model), "cfg": job.cfg, "schedule": len(job.sigmas) - 1, **called(found),
        "frames": frames(model, job), "weight_dtype": str(model.model.get_dtype()).removeprefix("torch."),
        **totals(found), "classes": classes(found), "by_block": by_block(found, len(stack)), "attention": lengths(found),
        "steps": steps_of(found, len(stack)), "memory": memory(model, found),
        "outside": {name: round(s, 6) for name, s in found.outside.items()},
        "features": [f.name for f in features_of(model.model_options) if not f.inactive], "notes": [*found.notes],
    }  # fmt: skip
    measured = Measured(
        {k: v["flops_share"] for k, v in told["classes"].items()},
        {k: v["share"] for k, v in told["classes"].items()} if told["step_seconds"] else None,
        told["classes"]["linear"]["intensity"] or 0.0, model.load_device.type, told["memory"]["offloaded"], around(told),
    )  # fmt: skip
    told["bottleneck"], told["why"] = bottleneck(measured)
    told["advice"] = advice(model, told)
    told["notes"] += notes(told, found)
    told["lines"] = lines(told)
    return told


def flop(count: float) -> str:
    """ "74.4 TFLOP"."""
    return f"{count / TERA:.4g} TFLOP" if count >= TERA / 10 else f"{count / TERA * 1000:.4g} GFLOP"


def device_of(model: Any) -> str:
    device = model.load_device
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    )


def frames(model: Any, job: Job) -> int:
    """Of the latent; 1 for a picture."""
    samples = start_latent(model, job)
    first = samples.unbind()[0] if getattr(samples, "is_nested", False) else samples
    return first.shape[2] if first.ndim == 5 else 1


def around(told: dict[str, Any]) -> float:
    """What text encoder and VAE take of a picture's time, where they were timed."""
    once = sum(told["outside"].values())
    step = told["plain_step_seconds"] or told["step_seconds"]
    return once / (once + step * told["schedule"]) if once and step else 0.0


def scale(found: Found) -> float:
    """Evaluations of a step, over those that were counted."""
    return found.evaluations / max(1, found.counted.evaluations)


def summed(meter: Meter | None, steps: float = 1) -> dict[str, Cell]:
    """By kind, of one step on average."""
    made = {kind: Cell() for kind in KINDS}
    for (_, kind, _), cell in meter.cells.items() if meter is not None else ():
        made[kind] = made[kind].add(cell)
    return {k: Cell(c.seconds / steps, c.calls, c.flops / steps, c.bytes / steps) for k, c in made.items()}


def called(found: Found) -> dict[str, Any]:
    """How the conditions of a step came to the network: in one call or several."""
    calls = [call for call in (found.run or found.counted).calls if call["step"] == 0]
    roles = [sorted(set(call["roles"])) for call in calls]
    how = "one prompt" if {r for part in roles for r in part} <= {0} else "joined" if [0, 1] in roles else "separate"
    return {"conditions": how, "network_calls": len(calls), "rows": [call["rows"] for call in calls]}


def totals(found: Found) -> dict[str, Any]:
    counted = summed(found.counted, 1 / scale(found))
    seconds = found.run.seconds if found.run is not None else []
    plain = sum(found.plain) / len(found.plain) if found.plain else None
    step = sum(seconds) / len(seconds) if seconds else sum(found.operators.values()) or None
    flops = sum(cell.flops for cell in counted.values())
    executed = sum(c.flops for c in summed(found.run, max(1, len(seconds))).values()) if found.run else None
    told = flops - found.counted.extra * scale(found)  # what the hooks of the run tell, too
    share = None if executed is None or told <= 0 else round(executed / told, 6)
    return {
        "step_flops": flops,
        "step_bytes": sum(cell.bytes for cell in counted.values()),
        "step_seconds": None if step is None else round(step, 6),
        "plain_step_seconds": None if plain is None else round(plain, 6),
        "measured_steps": len(seconds),
        "computed_share": share,
        "tflops_achieved": None if share is None or not plain else round(share * flops / TERA / plain, 6),
    }


def classes(found: Found) -> dict[str, Any]:
    """By kind of operator: of a step's arithmetic as it is without caches, and of the measured time."""
    counted, steps = summed(found.counted, 1 / scale(found)), max(1, len(found.run.seconds)) if found.run else 1
    timed = {k: c.seconds for k, c in summed(found.run, steps).items()}
    timed = {**dict.fromkeys(KINDS, 0.0), **found.operators} if found.operators else timed
    time, arithmetic = shares(timed), shares({k: c.flops for k, c in counted.items()})
    return {
        kind: {
            "share": round(time[kind], 6), "seconds": round(timed[kind], 6), "flops": cell.flops,
            "flops_share": round(arithmetic[kind], 6), "bytes": cell.bytes, "calls": cell.calls,
            "intensity": round(cell.flops / cell.bytes, 4) if cell.bytes else None,
        }
        for kind, cell in counted.items()
    }  # fmt: skip


def by_block(found: Found, count: int) -> list[dict[str, Any]]:
    """Of a step: seconds with everything inside of the block, and FLOPs."""
    seconds, flops = defaultdict(float), defaultdict(float)
    for (_, kind, block), cell in found.counted.cells.items():
        flops[block] += cell.flops * scale(found) if kind != "profiler" else 0.0
    steps = len(found.run.seconds) if found.run else 0
    for (_, kind, block), cell in found.run.cells.items() if found.run else ():
        seconds[block] += cell.seconds / max(1, steps) if kind != "profiler" else 0.0
    whole, every = sum(seconds.values()), sum(flops.values())
    return [
        {"block": n, "seconds": round(seconds[n], 6), "share": round(seconds[n] / whole, 6) if whole else None,
         "flops": flops[n], "flops_share": round(flops[n] / every, 6) if every else 0.0}
        for n in range(count)
    ]  # fmt: skip


def lengths(found: Found) -> list[dict[str, Any]]:
    """Attention calls of a step by their lengths, the most arithmetic first."""
    meter, total = found.counted, sum(found.counted.pairs.values())
    ordered = sorted(meter.lengths, key=lambda key: (-meter.pairs[key], key))[:MOST]
    return [
        {
            "queries": q,
            "keys": k,
            "calls": round(meter.lengths[q, k] * scale(found), 2),
            "share": round(meter.pairs[q, k] / total, 6) if total else None,
        }
        for q, k in ordered
    ]


def steps_of(found: Found, stack: int) -> list[dict[str, Any]]:
    """What each measured step computed: all blocks, some, or none, where a cache replayed them."""
    if found.run is None:
        return []
    made = []
    for step, seconds in enumerate(found.run.seconds):
        calls = [i for i, call in enumerate(found.run.calls) if call["step"] == step]
        blocks = sum(len(found.run.blocks.get(i, ())) for i in calls)
        whole = stack * max(1, len(calls))
        kind = "full" if not stack and calls else "forecast" if not blocks else "full" if blocks >= whole else "region"
        made.append({"step": step, "kind": kind, "seconds": round(seconds, 6), "calls": len(calls), "blocks": blocks})
    return made


def memory(model: Any, found: Found) -> dict[str, Any]:
    size, loaded = model.model_size(), model.loaded_size()
    peak = found.outcome.peak_bytes if found.outcome is not None else None
    moved = model.load_device.type != "cpu" and found.run is not None and loaded < 0.98 * size
    return {"weights": size, "loaded": loaded, "peak": peak, "offloaded": moved}


def notes(told: dict[str, Any], found: Found) -> list[str]:
    made = []
    timed, plain = told["step_seconds"], told["plain_step_seconds"]
    if plain and timed and found.run is not None:
        made.append(
            f"a step took {plain * 1e3:.4g} ms without hooks and {timed * 1e3:.4g} ms with them; shares are of the latter"
        )
    if told["computed_share"] is not None and told["computed_share"] < 0.995:
        made.append(
            f"{told['computed_share']:.0%} of the arithmetic was computed; the nodes on this MODEL saved the rest"
        )
    if told["computed_share"] is not None and told["computed_share"] > 1.005:
        made.append(
            f"{told['computed_share']:.0%} of the arithmetic of the bare network was computed: context windows that overlap, or "
            "other patches, call it for more"
        )
    if found.evaluations != 1:
        made.append(f"a step asks the model {found.evaluations:.4g} times, and is told as so many evaluations")
    for feature in found.record.get("features", ()):
        pairs = feature["facts"].get("pairs_fraction", 1.0)
        if pairs < 1:
            made.append(
                f"{feature['name']} computed {pairs:.1%} of the query-key pairs of its calls; FLOPs here count them all"
            )
    if not told["known"]:
        made.append("the blocks of this architecture are not known, so that nothing is told by block")
    if told["mode"] == "trace":
        made.append("time by class goes by the names of operators and kernels of torch's profiler")
    return made


def lines(told: dict[str, Any]) -> list[str]:
    per = f"{flop(told['step_flops'])} a step"
    took = f", {told['step_seconds']:.4g} s" if told["step_seconds"] else ""
    made = [
        f"{told['architecture']}: the bottleneck is {told['bottleneck']}: {told['why']}",
        f"{per}{took}; {told['conditions']} (rows {' and '.join(map(str, told['rows']))} of the network's calls), counted by {told['counted']}",
    ]
    for kind, row in told["classes"].items():
        if row["seconds"] or row["flops"]:
            time = f"{row['share']:.1%} of the time, {row['seconds'] * 1e3:.4g} ms; " if told["step_seconds"] else ""
            made.append(f"{NAMES.get(kind, kind)}: {time}{row['flops_share']:.1%} of the FLOPs")
    for row in told["attention"]:
        share = "" if row["share"] is None else f", {row['share']:.1%} of its arithmetic"
        made.append(
            f"attention of {row['queries']:,} queries and {row['keys']:,} keys: {row['calls']:g} calls a step{share}"
        )
    made.append(held(told))
    made += [f"{name}: {seconds:.4g} s once a picture" for name, seconds in told["outside"].items()]
    made += [f"try {row['node']}: {row['why']}" for row in told["advice"]]
    return made + told["notes"]


def held(told: dict[str, Any]) -> str:
    memory = told["memory"]
    peak = "" if memory["peak"] is None else f", {size(memory['peak'])} at the peak"
    return (
        f"weights of {size(memory['weights'])}{peak}; {size(told['step_bytes'])} moved a step by layers and attention"
    )


def size(count: float) -> str:
    """ "22.2 GiB"."""
    return f"{count / GIB:.3g} GiB" if count >= GIB / 10 else f"{1024 * count / GIB:.3g} MiB"


def picture(told: dict[str, Any]):
    """[1, H, W, 3]: bars of time and of arithmetic, strips of blocks."""
    groups = []
    rows = told["classes"].items()
    if told["step_seconds"]:
        groups.append(
            ("time of a step", [(k, v["share"], f"{v['share']:.1%}  {v['seconds'] * 1e3:.4g} ms") for k, v in rows])
        )
    counted = [(k, v["flops_share"], f"{v['flops_share']:.1%}  {flop(v['flops'])}") for k, v in rows if v["flops"]]
    groups.append(("arithmetic of a step", counted))
    strips = []
    if told["by_block"]:
        last = len(told["by_block"]) - 1
        if told["step_seconds"] and told["mode"] == "events":
            strips.append((f"time of blocks 0 to {last}", [row["seconds"] for row in told["by_block"]]))
        strips.append((f"arithmetic of blocks 0 to {last}", [row["flops"] for row in told["by_block"]]))
    return bars([f"{told['architecture']}: {told['bottleneck']}"], groups, strips)


def save(folder: Path, name: str, told: dict[str, Any]) -> Path:
    """Writes the report, in place of an earlier one of that name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(told, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path
