"""Noise levels of diffusers' schedulers as ComfyUI's model sampling: the same alphas at the same timesteps, the same
flows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_base
import comfy.model_sampling
import torch

STEPS, MOST_STEPS = 1000, 100_000


@dataclass(frozen=True)
class Noise:
    """kind: what the model predicts. alphas [steps]: squared share of the picture at each timestep, None for flows.
    settings: of core's sampling class."""

    kind: comfy.model_base.ModelType
    alphas: torch.Tensor | None
    settings: dict[str, Any]


class ZeroSnr(torch.nn.Module, comfy.model_sampling.CONST):
    """A v-prediction whose last timestep is noise alone, where the usual sigma would be infinite: sampled as the flow
    y = (1 - sigma) x0 + sigma n that its x = sqrt(a) x0 + sqrt(1 - a) n becomes when divided by sqrt(a) + sqrt(1 - a)."""

    noise_scale = 1.0

    def __init__(self, alphas: torch.Tensor):
        super().__init__()
        roots, rests = alphas.sqrt(), (1 - alphas).sqrt()
        self.register_buffer("sigmas", (rests / (roots + rests)).float())
        self.num_timesteps = len(alphas)

    def shares(self, sigma: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(a) and sqrt(1 - a) at a sigma [B], for x [B, ...]."""
        sigma = comfy.model_sampling.reshape_sigma(sigma, like.ndim)
        length = ((1 - sigma) ** 2 + sigma**2).sqrt()
        return (1 - sigma) / length, sigma / length

    def calculate_input(self, sigma, noise):
        root, rest = self.shares(sigma, noise)
        return noise * (root + rest)

    def calculate_denoised(self, sigma, model_output, model_input):
        root, rest = self.shares(sigma, model_output)
        return root * (root + rest) * model_input - rest * model_output

    @property
    def sigma_min(self):
        return self.sigmas[0]

    @property
    def sigma_max(self):
        return self.sigmas[-1]

    def timestep(self, sigma):
        distance = (sigma.to(self.sigmas.device) - self.sigmas[:, None]).abs()
        return distance.argmin(dim=0).view(sigma.shape).to(sigma.device)

    def sigma(self, timestep):
        t = timestep.float().to(self.sigmas.device).clamp(0, len(self.sigmas) - 1)
        low, high = t.floor().long(), t.ceil().long()
        return torch.lerp(self.sigmas[low], self.sigmas[high], t.frac()).to(timestep.device)

    def percent_to_sigma(self, percent):
        if percent <= 0.0:
            return 1.0
        if percent >= 1.0:
            return 0.0
        return self.sigma(torch.tensor((1.0 - percent) * (len(self.sigmas) - 1))).item()


def noise_of(schedule: Mapping[str, Any], where: str) -> Noise:
    """From a scheduler's config. ValueError for what ComfyUI has no sampling for."""
    prediction = schedule.get("prediction_type", "epsilon")
    if "FlowMatch" in str(schedule.get("_class_name")) or schedule.get("use_flow_sigmas"):
        prediction = "flow_prediction"
    if prediction == "flow_prediction":
        return _flow(schedule, where)
    kinds = {"epsilon": comfy.model_base.ModelType.EPS, "v_prediction": comfy.model_base.ModelType.V_PREDICTION}
    if prediction not in tuple(kinds):
        raise ValueError(
            f"{where} says prediction_type {prediction!r}; epsilon, v_prediction and flow_prediction are known."
        )
    try:
        alphas = alphas_of(schedule, where)
    except (TypeError, RuntimeError, OverflowError, IndexError) as error:
        raise ValueError(f"{where} makes no noise levels ({type(error).__name__}). Download it again.") from error
    falls = alphas.numel() > 1 and bool((alphas.diff() < 0).all())
    if not falls or not 0 <= float(alphas[-1]) < float(alphas[0]) <= 1:  # NaN passes no comparison
        raise ValueError(f"{where} makes noise levels that do not rise from picture to noise. Download it again.")
    return Noise(kinds[prediction], alphas, {"timesteps": len(alphas)})


def _flow(schedule: Mapping[str, Any], where: str) -> Noise:
    """A fixed shift; or the one that a size-dependent shift has at its largest, as core's Flux, whose model sampling
    nodes then apply."""
    shift = schedule.get("flow_shift", schedule.get("shift", 1.0))
    sized = bool(schedule.get("use_dynamic_shifting"))
    shift = (schedule.get("max_shift") or shift) if sized else shift
    if type(shift) not in (int, float) or not 0 < shift < 100:
        raise ValueError(f"{where} says a shift of {shift!r}, which is no number between 0 and 100. Download it again.")
    if sized:
        return Noise(comfy.model_base.ModelType.FLUX, None, {"shift": float(shift)})
    return Noise(comfy.model_base.ModelType.FLOW, None, {"shift": float(shift), "multiplier": 1000})


def alphas_of(schedule: Mapping[str, Any], where: str) -> torch.Tensor:
    """prod (1 - beta) [steps], shifted in SNR and stretched to zero SNR where asked."""
    steps, kind = schedule.get("num_train_timesteps", STEPS), schedule.get("beta_schedule", "linear")
    if type(steps) is not int or not 1 < steps <= MOST_STEPS:
        raise ValueError(f"{where} says num_train_timesteps {steps!r}, not 2 to {MOST_STEPS}. Download it again.")
    start, end = schedule.get("beta_start", 1e-4), schedule.get("beta_end", 0.02)
    if schedule.get("trained_betas") is not None:
        betas = torch.tensor(schedule["trained_betas"], dtype=torch.float32)
    elif kind == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float32)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    else:
        raise ValueError(f"{where} says beta_schedule {kind!r}; linear and scaled_linear are known.")
    alphas = torch.cumprod(1.0 - betas, 0).double()
    scale = schedule.get("snr_shift_scale") or 1.0
    alphas = alphas / (scale + (1 - scale) * alphas)
    if schedule.get("rescale_betas_zero_snr"):
        roots = alphas.sqrt()
        roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
        alphas = roots**2
    return alphas


def install(sampling: torch.nn.Module, noise: Noise) -> torch.nn.Module:
    """The model sampling of core with these noise levels, or the one that takes its place."""
    if noise.alphas is None:
        return sampling
    if noise.alphas[-1] > 0:
        sampling.set_sigmas(((1 - noise.alphas) / noise.alphas).sqrt())
        return sampling
    if noise.kind is not comfy.model_base.ModelType.V_PREDICTION:
        raise ValueError(
            "A schedule with zero SNR (rescale_betas_zero_snr) needs v_prediction; epsilon tells nothing there."
        )
    return ZeroSnr(noise.alphas)
