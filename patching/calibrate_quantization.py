"""One sampling run of the plain MODEL, of which the inputs of every Linear layer that could be quantized are recorded."""

from typing import Any

import torch

from .. import archs
from ..methods.quant.calibration import LayerStatistics, Statistics
from ..methods.quant.keep_list import select
from .forwards import cleared
from .run import sampler_name
from .sampling import Job, Progress, metered, sample
from .sizes import fingerprint

NAME = "Calibrate Quantization"
FOLDER = "tessera_calibrations"  # in the output folder


class Watch:
    """Looks at the inputs of layers while its block lasts."""

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...], rows: int, seed: int):
        self.model, self.names, self.rows, self.seed = model, names, rows, seed
        self.layers: dict[str, LayerStatistics] = {}
        self.hooks: list[Any] = []

    def __enter__(self) -> "Watch":
        for number, name in enumerate(self.names):
            module = self.model.get_submodule(name)
            self.hooks.append(module.register_forward_pre_hook(self._hook(name, number), with_kwargs=True))
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def _hook(self, name: str, number: int):
        def look(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            if name not in self.layers:
                self.layers[name] = LayerStatistics(x.shape[-1], self.rows, self.seed + number)
            self.layers[name].add(x)

        return look


def calibrate(model: Any, job: Job, rows: int, seed: int, exclude: str) -> tuple[Statistics, Any]:
    """(statistics, final latent). ValueError where nothing is to be recorded."""
    inside = cleared(model).diffusion_model
    arch = archs.find(inside)
    found = select(inside.state_dict(), "" if arch is None else arch.home, exclude or None)
    if not found.chosen:
        raise ValueError(f"{NAME} found no layer that could be quantized; is this MODEL quantized already?")
    progress = Progress(len(job.sigmas) - 1)
    with Watch(inside, found.chosen, rows, seed) as watch:
        outcome = sample(metered(model), job, progress.step)
    if not watch.layers:
        raise ValueError(f"{NAME} met no evaluation of the model; check the sampler and the schedule.")
    about = fingerprint(model), len(job.sigmas) - 1, sampler_name(job.sampler)
    return Statistics(watch.layers, *about), outcome.samples


def lines_of(found: Statistics) -> list[str]:
    """The layers whose tokens differ most, and those with the most salient channels."""
    by = sorted(found.layers.items(), key=lambda item: -item[1].fluctuation)
    salience = {name: float(s.amax.max() / s.amax.median().clamp_min(1e-12)) for name, s in found.layers.items()}
    salient = sorted(salience, key=lambda name: -salience[name])
    tokens = max((s.count for s in found.layers.values()), default=0)
    return [
        f"{len(found.layers)} layers, up to {tokens} tokens each, {found.steps} steps",
        "tokens differ most in " + ", ".join(f"{name} ({s.fluctuation:.2g})" for name, s in by[:3]),
        "channels stand out most in "
        + ", ".join(f"{name} ({salience[name]:.3g} times the median)" for name in salient[:3]),
    ]
