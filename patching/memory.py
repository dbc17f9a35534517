"""What our nodes hold while sampling counts in core's memory estimate, so that it loads fewer weights instead of running
out of memory in the middle of a run."""

from dataclasses import dataclass
from typing import Any

import torch

from .run import RUN
from .sizes import heads_of

KEY = "tessera_held"


@dataclass(eq=False)
class Reserved:
    """Stands among a run's ControlNets, the one list of things that core asks how much memory they will take."""

    held: int  # bytes
    extra_hooks: Any = None
    previous_controlnet: Any = None

    def get_models(self) -> list[Any]:
        return []

    def get_extra_hooks(self) -> list[Any]:
        return []

    def inference_memory_requirements(self, dtype: torch.dtype) -> int:
        return self.held


def prepare_sampling(executor, model, noise_shape, conds, *args, **kwargs):
    """PREPARE_SAMPLING wrapper."""
    options = kwargs.get("model_options") or (args[0] if args else None) or {}
    run = options.get("transformer_options", {}).get(RUN)
    for feature in () if run is None else run.acting:
        feature.prepare(run, tuple(noise_shape))
    several = bool(model.get_additional_models_with_key("multigpu"))  # there core copies its ControlNets to every GPU
    acting = () if run is None or several else run.acting
    held = sum(feature.held_bytes(run, tuple(noise_shape), conds) for feature in acting)
    noise_shape = torch.Size(shown(run, tuple(noise_shape)))  # core asks for nothing but an estimate from it
    if not held:
        return executor(model, noise_shape, conds, *args, **kwargs)
    asked = {**conds, KEY: [{"control": Reserved(held)}]}
    found, returned, *rest = executor(model, noise_shape, asked, *args, **kwargs)
    return (found, {k: v for k, v in returned.items() if k != KEY}, *rest)


def shown(run, noise_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what the model is given at once."""
    for feature in () if run is None else run.acting:
        noise_shape = feature.shown(noise_shape)
    return noise_shape


def stream_elements(run, noise_shape: tuple[int, ...], conds: dict[str, Any]) -> int:
    """Elements of one stack output over all rows of all conditions, as well as can be told before the model runs."""
    prompts = [cond for part in conds.values() for cond in part]
    rows = noise_shape[0] * len(prompts)
    grid = grid_of(run, noise_shape)
    if grid is None:
        return rows * noise_shape[1] * noise_shape[-1]
    heads, width = heads_of(run.network)
    text = max((cond["cross_attn"].shape[1] for cond in prompts if cond.get("cross_attn") is not None), default=0)
    tokens = grid[0] * grid[1] * grid[2] + (text if run.arch.place != "none" else 0)
    tokens += sum(shape[2] for shape in run.latent_shapes[1:])  # sound [B, C, T, ...]: one token a moment
    return rows * tokens * heads * width


def grid_of(run, noise_shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """The token grid of a noise tensor before the model runs, None where it is no latent of this family."""
    if len(run.latent_shapes) > 1:  # packed into one row; the first one is the video
        noise_shape = run.latent_shapes[0]
    try:
        return run.arch.grid(run.network, torch.empty(noise_shape, device="meta"))
    except (IndexError, TypeError, AttributeError, ValueError, RuntimeError):
        return None
