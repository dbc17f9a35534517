"""Few-Step Sampler and its schedules: steps of distilled models, from ComfyUI's own model and noise."""

import logging
from typing import Any

import comfy.samplers
import torch

from ..methods.sampling import few_step
from .cache import CacheFeature
from .run import features_of

log = logging.getLogger("tessera")
NAME = "Few-Step Sampler"


class FewSteps:
    """mode ode_jump: Euler's step. renoise: to the clean latent, then fresh noise. gamma: that share of it is fresh."""

    def __init__(self, mode: str, gamma: float):
        self.gamma = {"ode_jump": 0.0, "renoise": 1.0}.get(mode, gamma)

    def __call__(self, model, x, sigmas, extra_args=None, callback=None, disable=None):
        extra_args = extra_args or {}
        warn(model, extra_args)
        ones = x.new_ones([x.shape[0]])
        generator = torch.Generator().manual_seed(
            ((extra_args.get("seed") or 0) + 1) % (1 << 64)
        )  # of the CPU: the same on every GPU
        sampling = model.inner_model.model_patcher.get_model_object("model_sampling")
        for i in range(len(sigmas) - 1):
            denoised = model(x, sigmas[i] * ones, **extra_args)
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
            if sigmas[i + 1] > 0 and self.gamma > 0:
                noise = torch.randn(x.shape, generator=generator).to(x)
                x = self.noised(sampling, x, denoised, noise, sigmas[i], sigmas[i + 1])
            elif self.gamma == 1:
                x = denoised
            else:
                x = few_step.jump(x, denoised, sigmas[i], sigmas[i + 1])
        return x

    def noised(self, sampling: Any, x, denoised, noise, sigma, following) -> torch.Tensor:
        fresh = sampling.noise_scaling(following, noise, denoised)
        if self.gamma == 1:
            return fresh
        clean = sampling.noise_scaling(following, torch.zeros_like(noise), denoised)
        return few_step.mixed(few_step.jump(x, denoised, sigma, following), fresh, clean, self.gamma)


def warn(model: Any, extra_args: dict[str, Any]) -> None:
    """Says what few steps do not go with; the user may know better."""
    cfg = getattr(model.inner_model, "cfg", 1.0)
    if isinstance(cfg, int | float) and cfg > 1:
        log.warning("%s: cfg is %g; models distilled to few steps have their guidance built in, set cfg 1.", NAME, cfg)
    features = features_of(extra_args.get("model_options") or {})
    caches = [f.name for f in features if isinstance(f, CacheFeature) and not f.inactive and not f.off]
    if caches:
        log.warning("%s: %s skips steps of a run that has few; take it off.", NAME, " and ".join(caches))


def sampler_of(mode: str, gamma: float) -> Any:
    """SAMPLER."""
    return comfy.samplers.KSAMPLER(FewSteps(mode, gamma))


class Shift:
    """The sigma of part t of a MODEL's schedule, 1 is noise: through its own shift, or another one of a flow."""

    def __init__(self, model: Any, shift: float, node: str, remedy: str = "set shift 0"):
        self.sampling, self.shift = model.get_model_object("model_sampling"), shift
        self.most = float(self.sampling.sigma_max)
        if shift > 0 and self.most > 1.001:
            raise ValueError(
                f"{node}: shift {shift:g} is for flow models, and the sigmas of this one go up to {self.most:g}; {remedy}."
            )

    def __call__(self, t: float) -> float:
        if t <= 0:
            return 0.0
        if self.shift > 0:
            return few_step.shifted(t, self.shift)
        return min(float(self.sampling.percent_to_sigma(1.0 - t)), self.most)


def schedule(points: list[float], sigma: Shift, denoise: float) -> tuple[torch.Tensor, list[str]]:
    """(SIGMAS of the points t with a last 0, lines of a report)."""
    kept, taken = few_step.tail(points, denoise)
    found = [sigma(t) for t in kept]
    if not kept:
        return torch.FloatTensor([]), ["denoise 0: no steps"]
    lines = [f"{len(kept) - 1} steps: " + ", ".join(f"{s:.4f}" for s in found)]
    if denoise < 1:
        lines.append(f"denoise {denoise:g} starts at the edge {taken:.4g}")
    return torch.FloatTensor(found), lines
