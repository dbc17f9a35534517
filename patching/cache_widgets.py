"""The inputs that every cache node shares, under the same names, and their meaning."""

import json
from typing import Any

from comfy_api.latest import io

from ..methods.cache.profile import Profile
from ..methods.cache.schedule import Schedule
from .widgets import percents

ScheduleSocket = io.Custom("TESSERA_SCHEDULE")  # methods/cache/schedule.py: Schedule
ProfileSocket = io.Custom("TESSERA_PROFILE")  # methods/cache/profile.py: Profile
CalibrationSocket = io.Custom("TESSERA_CACHE_CALIBRATION")  # methods/cache/calibration.py: Calibration


def where_cached() -> list[Any]:
    """Part of the schedule, storage, and what to do where the model cannot be served. They come last in a schema."""
    return [
        io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01, round=0.001, advanced=True,
            tooltip="Part of the noise schedule after which evaluations may be skipped, 0 to 1. Higher leaves more of the start exact."),
        io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, round=0.001, advanced=True,
            tooltip="Part of the noise schedule up to which evaluations may be skipped, 0 to 1. Lower leaves more of the end exact."),
        io.Combo.Input("cache_device", options=["gpu", "cpu"], advanced=True,
            tooltip="Where stored outputs are held. cpu saves VRAM and costs a transfer at each evaluation."),
        io.Combo.Input("cache_dtype", options=["model", "float32", "bfloat16"], advanced=True,
            tooltip="Precision of stored outputs. model keeps the model's own; bfloat16 halves the memory of fp32."),
        io.Combo.Input("multi_eval", options=["count_each", "skip_whole_steps"], advanced=True,
            tooltip="For samplers that evaluate several times a step (heun, dpm_2): decide for each evaluation, or for whole steps."),
        io.Combo.Input("unsupported", options=["error", "warn"], advanced=True,
            tooltip="On a model that cannot be served: stop with a sentence, or log it and leave the model as it is."),
        io.Boolean.Input("cache_with_control", default=True, optional=True, advanced=True,
            tooltip="Skip also while a ControlNet acts. It is computed anew whenever the control starts, ends or "
                    "jumps. Off computes every evaluation under control: exact and slow."),
        ScheduleSocket.Input("schedule", optional=True,
            tooltip="From Cache Schedule: which steps are computed. It replaces interval, threshold, warm-up and tail."),
        ProfileSocket.Input("profile", optional=True,
            tooltip="From Solve Threshold: settings found for this model, sampler and number of steps. They replace the node's own."),
    ]  # fmt: skip


def warmup_inputs(warmup: int = 3, tail_full: int = 1) -> list[Any]:
    """Evaluations that are computed in any case."""
    return [
        io.Int.Input("warmup", default=warmup, min=0, max=100,
            tooltip="Evaluations at the start that are always computed. Higher keeps the composition closer to the plain run."),
        io.Int.Input("tail_full", default=tail_full, min=0, max=10,
            tooltip="Last sampler steps that are always computed. Higher keeps fine detail."),
    ]  # fmt: skip


def cached(start_percent: float, end_percent: float, cache_with_control: bool = True, **rest: Any) -> dict[str, Any]:
    """The shared inputs as CacheFeature fields."""
    return {"percents": percents(start_percent, end_percent), "cache_with_control": cache_with_control, **rest}


def own(inputs: dict[str, Any]) -> dict[str, Any]:
    """The widgets that say what a node computes, for the profile of its MODEL: not where it holds things, nor sockets."""
    held = ("cache_device", "cache_dtype", "cache_with_control", "unsupported")
    return {k: v for k, v in inputs.items() if isinstance(v, str | int | float) and k not in held}


def profiled(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """A node's inputs after its profile. ValueError where the profile is another node's or sets what it has not. Every
    cache has a schedule, also where none is connected."""
    profile: Profile | None = inputs.get("profile")
    if profile is None:
        return inputs
    unknown = sorted({*profile.inputs} - {*inputs, "schedule"})
    if profile.node != name or unknown:
        raise ValueError(
            f"{name} was given a profile for {profile.node}{f' with {unknown}' if unknown else ''}. Connect it to that node."
        )
    found = {**inputs, **profile.inputs}
    if isinstance(found.get("schedule"), dict):
        found["schedule"] = Schedule.from_json(json.dumps(found["schedule"]))
    return found
