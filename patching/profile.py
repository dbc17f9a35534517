"""Profile Model: what a run of the user's own graph spends on which operators and blocks. Shapes are counted without
computing; time is measured in a run through the shared runner, with every patch of the MODEL in place."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from .. import archs
from .accelerate import Accelerate
from .clock import expected_evaluations
from .forwards import exchange
from .plan_foreign import compiled
from .profile_meter import Meter
from .profile_shapes import CountingMeter, Shapes, Untold
from .report import latest_record
from .run import FEATURES, attach, features_of, sampler_name
from .sampling import Job, Outcome, Progress, metered, peak, sample, synchronize

MODES = ("events", "analytic", "trace")
KEY = "tessera_profile"
NAME = "Profile Model"


class Enough(Exception):
    """As many steps as were asked for are done."""


@dataclass(frozen=True)
class Asked:
    """steps: measured ones from the first of the schedule on; 0: all. encode, decode: what stands outside of sampling, a
    text encoder and a VAE that is given the samples."""

    mode: str = "events"
    steps: int = 8
    encode: Callable[[], Any] | None = None
    decode: Callable[[Any], Any] | None = None
    trace: Path | None = None


@dataclass
class Found:
    """What a report is made of. counted: of one step; how: where its numbers come from. run: of the measured steps."""

    counted: Meter
    how: str
    run: Meter | None = None
    outcome: Outcome | None = None
    evaluations: float = 1.0  # of a step on average: heun asks for two predictions
    plain: list[float] = field(default_factory=list)  # seconds of steps of the same run without hooks
    operators: dict[str, float] = field(default_factory=dict)  # seconds by kind, from a trace
    outside: dict[str, float] = field(default_factory=dict)  # seconds of text encoder and VAE
    record: dict[str, Any] = field(default_factory=dict)  # what our nodes say of the measured run
    notes: list[str] = field(default_factory=list)


def measure(model: Any, job: Job, asked: Asked) -> Found:
    """Runs what the mode asks for. The MODEL keeps nothing, whatever happens."""
    total = len(job.sigmas) - 1
    if total < 1:
        raise ValueError(f"{NAME} needs a schedule of at least 2 sigmas, got {len(job.sigmas)}; raise the steps.")
    steps = min(asked.steps or total, total)
    if compiled(model) and asked.mode == "events":
        raise ValueError(
            f"{NAME} cannot look inside of what torch.compile has made one piece of. Set mode to trace or analytic, or connect "
            "the MODEL from before it was compiled."
        )
    progress = Progress({"analytic": 1, "trace": 2 + steps, "events": 2 + 2 * steps}[asked.mode])
    found = count(model, job, progress)
    if asked.mode == "analytic":
        schedule = [float(s) for s in job.sigmas]
        found.evaluations = len(expected_evaluations(sampler_name(job.sampler), schedule)) / total or 1.0
        return found
    until(metered(model), job, 1, progress)  # warm: caches of kernels and of memory
    model = settled(model)
    if asked.mode == "trace":
        traced(model, job, steps, asked, found, progress)
    else:
        events(model, job, steps, found, progress)
    if asked.encode is not None:
        found.outside["text"] = timed(asked.encode, model)
    if asked.decode is not None and found.outcome is not None:
        samples = found.outcome.samples
        found.outside["vae"] = timed(lambda: asked.decode(samples), model)  # type: ignore[misc]
    return found


def settled(model: Any) -> Any:
    """What Accelerate found in the warm run is measured, not its trials."""
    made = model.clone()
    if features := features_of(made.model_options):
        kept = tuple(replace(f, again=False) if isinstance(f, Accelerate) else f for f in features)
        made.model_options["transformer_options"][FEATURES] = kept
    return made


def timed(act: Callable[[], Any], model: Any) -> float:
    """Seconds of the second of two calls: the first loads the weights."""
    act()
    synchronize(model.load_device)
    start = time.perf_counter()
    act()
    synchronize(model.load_device)
    return time.perf_counter() - start


def until(model: Any, job: Job, steps: int, progress: Progress, each=lambda: None) -> Outcome | None:
    """The first steps of a run on a metered MODEL, each followed by each()."""
    done, kept = 0, []

    def on_step():
        nonlocal done
        each()
        progress.step()
        done += 1
        if done >= steps and steps < len(job.sigmas) - 1:
            raise Enough

    def watch(step, denoised, x):
        kept[:] = [denoised]

    try:
        return sample(model, job, on_step, watch=watch)
    except Enough:
        last = kept[0]
        return Outcome(last.to("cpu"), 0.0, None) if not getattr(last, "is_nested", False) else None


def events(model: Any, job: Job, steps: int, found: Found, progress: Progress) -> None:
    """The same steps twice: without a hook, for their plain time, then with them."""
    device = model.load_device

    def stamp():
        synchronize(device)
        marks.append(time.perf_counter())

    marks: list[float] = []
    with hooked(model, (WrappersMP.PREDICT_NOISE, first(stamp, marks))) as plain:
        until(plain, job, steps, progress, stamp)
    found.plain = [b - a for a, b in zip(marks, marks[1:], strict=False)]
    meter = Meter(found.counted.arch, lambda: synchronize(device))
    with metering(model, meter) as watched:
        found.outcome = until(watched, job, steps, progress, meter.end_step)
        found.record = latest_record(watched)
    found.run = meter
    found.evaluations = meter.evaluations / max(1, meter.step)
    if found.outcome is not None:
        found.outcome.peak_bytes = found.outcome.peak_bytes or peak(device)


def first(stamp: Callable[[], None], marks: list[float]):
    """A PREDICT_NOISE wrapper that stamps the first prediction of a run."""

    def wrapper(executor, *args, **kwargs):
        if not marks:
            stamp()
        return executor(*args, **kwargs)

    return wrapper


@contextlib.contextmanager
def hooked(model: Any, *wrappers: tuple[str, Any]):
    """A clone of the MODEL with our runtime and then these wrappers, so that they are the innermost ones."""
    made = metered(model)
    for kind, wrapper in wrappers:
        made.add_wrapper_with_key(kind, KEY, wrapper)
    yield made


@contextlib.contextmanager
def metering(model: Any, meter: Meter):
    """The MODEL under a meter, whose hooks are gone afterwards."""
    wrappers = (
        (WrappersMP.PREDICT_NOISE, meter.predict_noise),
        (WrappersMP.APPLY_MODEL, meter.apply_model),
        (WrappersMP.DIFFUSION_MODEL, meter.diffusion_model),
    )
    try:
        with hooked(model, *wrappers) as made:
            yield made
    finally:
        meter.remove()


def count(model: Any, job: Job, progress: Progress) -> Found:
    """FLOPs, bytes and sequence lengths of the first step: from shapes where the network can be run on them, else from one
    evaluation that is computed."""
    arch = archs.find(model.get_model_object("diffusion_model"))
    plain = bare(model)
    try:
        shapes = Shapes(plain, arch)
        exchange(plain, "diffusion_model", lambda *_: shapes)
        with hooked(plain, (WrappersMP.PREDICT_NOISE, shapes.meter.predict_noise)) as watched:
            until(watched, job, 1, progress)
        return Found(shapes.meter, "shapes")
    except Untold as error:
        why = str(error)
    meter = CountingMeter(arch)
    with metering(bare(model), meter) as watched:
        until(watched, job, 1, progress, meter.end_step)
    note = f"counted on one evaluation that was computed, because shapes alone did not tell ({why})"
    return Found(meter, "one computed evaluation", notes=[note])


def bare(model: Any) -> Any:
    """The MODEL without anything that acts while sampling, but for what its sampler needs; its weights, and modules put in
    place of others, stay."""
    plain = model.clone()
    plain.model_options = {"transformer_options": {}}
    plain.wrappers, plain.callbacks = {}, {}
    for feature in features_of(model.model_options):
        if feature.for_sampler:
            plain = attach(plain, feature)
    return plain


def traced(model: Any, job: Job, steps: int, asked: Asked, found: Found, progress: Progress) -> None:
    """torch's own profiler around the measured steps, for Perfetto."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if model.load_device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    tally = Meter(None)
    counting = hooked(model, (WrappersMP.PREDICT_NOISE, tally.predict_noise))
    with counting as watched, torch.profiler.profile(activities=activities) as profiler:
        found.outcome = until(watched, job, steps, progress, tally.end_step)
        synchronize(model.load_device)
    steps = tally.step or steps  # a sampler may make more of them than its schedule has, as those of blocks do
    found.evaluations = tally.evaluations / steps
    if asked.trace is not None:
        asked.trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(asked.trace))
    kind = torch.autograd.DeviceType.CUDA if len(activities) > 1 else torch.autograd.DeviceType.CPU
    for event in profiler.key_averages():
        if event.device_type != kind:  # on a GPU its kernels; the operators that launched them have the same time again
            continue
        spent = event.self_device_time_total if len(activities) > 1 else event.self_cpu_time_total
        name = operator_kind(event.key)
        found.operators[name] = found.operators.get(name, 0.0) + spent / 1e6 / steps


WORDS = {
    "attention": ("attention", "flash", "softmax", "fmha", "bmm", "sdpa", "tessera::"),
    "convolution": ("conv",),
    "norm": ("norm",),
    "linear": ("mm", "linear", "gemm", "addmv", "cutlass", "nvjet"),
}


def operator_kind(name: str) -> str:
    """The class of an operator or kernel of a trace, by its name."""
    low = name.lower()
    return next((kind for kind, words in WORDS.items() if any(word in low for word in words)), "other")
