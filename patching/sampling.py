"""The shared runner: recorders and comparisons sample through it, so that all measure alike."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch

from .forwards import untangle
from .report import latest_record
from .run import Feature, attach

TRACE_ELEMENTS = 1 << 20  # of each step's prediction, evenly spaced: bounds what a trace holds
CLEAR_PEAK = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


@dataclass
class Job:
    """What to sample, the same for every MODEL under comparison."""

    positive: Any
    negative: Any
    latent: dict[str, Any]
    sampler: Any
    sigmas: torch.Tensor
    noise: Any  # NOISE: .seed and .generate_noise(latent)
    cfg: float


@dataclass
class Outcome:
    """One finished run."""

    samples: Any  # tensor or nested tensor, on the CPU
    seconds: float
    peak_bytes: int | None
    trace: list[torch.Tensor] = field(default_factory=list)  # predicted clean latent after each step, fp32, subsampled
    record: dict[str, Any] = field(default_factory=dict)


def metered(model):
    """The MODEL with a feature that only asks for a record of the run."""
    return attach(model, Feature(None, "Meter"))


def start_latent(model, job: Job) -> Any:
    """The job's latent; an empty one takes the channels, frames and size that this MODEL wants."""
    return comfy.sample.fix_empty_latent_channels(
        model,
        job.latent["samples"],
        job.latent.get("downscale_ratio_spacial"),
        job.latent.get("downscale_ratio_temporal"),
    )


def sample(
    model,
    job: Job,
    on_step: Callable[[], None] = lambda: None,
    sigmas: torch.Tensor | None = None,
    watch: Callable[[int, Any, Any], None] | None = None,
) -> Outcome:
    """Runs the job on a metered MODEL. on_step is called after every sampler step; raising there interrupts. watch: is
    given each step's number, its denoised prediction and the latent that it was made from."""
    sigmas = (job.sigmas if sigmas is None else sigmas).clone()  # uni_pc writes into its schedule
    latent = start_latent(model, job)
    noise = job.noise.generate_noise({**job.latent, "samples": latent})
    trace: list[torch.Tensor] = []

    def callback(step, denoised, x, total):
        trace.append(thin(denoised))
        if watch is not None:
            watch(step, denoised, x)
        on_step()

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(job.positive, job.negative)
    guider.set_cfg(job.cfg)
    untangle(model)
    comfy.model_management.load_models_gpu([model])
    reset_peak(model.load_device)
    synchronize(model.load_device)
    start = time.perf_counter()
    samples = guider.sample(
        noise,
        latent,
        job.sampler,
        sigmas,
        denoise_mask=job.latent.get("noise_mask"),
        callback=callback,
        disable_pbar=True,
        seed=job.noise.seed,
    )
    synchronize(model.load_device)
    seconds = time.perf_counter() - start
    return Outcome(samples.to("cpu"), seconds, peak(model.load_device), trace, latest_record(model))


def thin(latent: Any) -> torch.Tensor:
    """At most TRACE_ELEMENTS evenly spaced values of a latent [N], fp32 on the CPU."""
    parts = latent.unbind() if getattr(latent, "is_nested", False) else [latent]
    flat = torch.cat([part.detach().reshape(-1) for part in parts])
    return flat[:: -(-flat.numel() // TRACE_ELEMENTS)].float().cpu().clone()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_PEAK.exists():
        try:
            CLEAR_PEAK.write_text("5")  # Linux: the resident set's high-water mark starts again
        except OSError:
            return


def peak(device: torch.device) -> int | None:
    """Bytes: allocated on the GPU, or resident in this process; None where neither can be told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not STATUS.exists():
        return None
    for row in STATUS.read_text().splitlines():
        if row.startswith("VmHWM:"):
            return int(row.split()[1]) * 1024
    return None


class Progress:
    """ComfyUI's progress bar over several runs; its update also raises on interrupt."""

    def __init__(self, total: int):
        self.bar = comfy.utils.ProgressBar(total)

    def step(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar.update(1)
