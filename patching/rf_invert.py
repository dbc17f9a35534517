"""RF Invert: a latent is followed back along the flow to the noise that it comes from."""

from dataclasses import dataclass
from typing import Any

import comfy.model_sampling
import comfy.samplers
import torch

from ..methods.sampling.feature_bank import Bank
from ..methods.sampling.flow import solve, velocity
from .feature_sharing import LAST_THIRD, RecordFeature, blocks_of
from .run import attach
from .sampling import Job, Progress, metered, sample

NAME = "RF Invert"


class InvertedNoise:
    """NOISE that starts a run of the inverted schedule at the inverted state, whatever latent that run is given.

    x [B, C, ...] at sigma, as the diffusion model sees it; scale: the model's own factor of its noise."""

    def __init__(self, x: torch.Tensor, sigma: float, scale: float, latent_format: Any):
        self.x, self.sigma, self.scale, self.latent_format, self.seed = x, sigma, scale, latent_format, 0

    def generate_noise(self, input_latent: dict[str, Any]) -> torch.Tensor:
        samples = input_latent["samples"]
        if getattr(samples, "is_nested", False) or samples.shape[1:] != self.x.shape[1:]:
            shape = "several latents" if getattr(samples, "is_nested", False) else [*samples.shape]
            raise ValueError(
                f"{NAME} made noise for a latent {[*self.x.shape]}, and this run has {shape}. Sample from the LATENT that was "
                "inverted, or an empty one of its size."
            )
        if samples.shape[0] % self.x.shape[0]:
            raise ValueError(
                f"{NAME} made noise for {self.x.shape[0]} latents, and this run has {samples.shape[0]}. Invert as many, or one."
            )
        x = self.x.repeat(samples.shape[0] // self.x.shape[0], *[1] * (self.x.ndim - 1))
        if self.sigma != 1:  # core adds the rest of the latent to it
            clean = samples.float().cpu()
            x = x - (1 - self.sigma) * (self.latent_format.process_in(clean) if torch.count_nonzero(clean) else clean)
        return x / (self.sigma * self.scale)


class Zeros:
    """NOISE for a run that starts from its latent."""

    seed = 0

    def generate_noise(self, input_latent):
        return torch.zeros_like(input_latent["samples"])


class Inverter(comfy.samplers.Sampler):
    """Follows the flow from the latent up to the last sigma and keeps where it arrives. With a bank that
    records, the last sigma is asked once more, for an edit will start there."""

    def __init__(self, solver: str, floor: float, euler_first: bool, bank: Bank):
        self.solver, self.floor, self.euler_first, self.bank = solver, floor, euler_first, bank
        self.reached: torch.Tensor | None = None

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        points = [float(s) for s in sigmas]

        def denoise(x, sigma):
            self.bank.see(float(torch.tensor(sigma, dtype=torch.float32)))  # as the clock will read it
            return model_wrap(x, x.new_full((x.shape[0],), sigma), **extra_args)

        def told(i, x, slope):
            if callback is not None:
                callback(i, x - points[i] * slope, x, len(points) - 1)

        field = velocity(denoise, self.floor)
        first = points[:2] if self.euler_first else points[:1]
        x = solve(field, latent_image, first, "euler", told)
        x = solve(field, x, points[len(first) - 1 :], self.solver, lambda i, *rest: told(i + len(first) - 1, *rest))
        if self.bank.steps:
            field(x, points[-1])
        self.reached = x.detach().float().cpu()
        return x


@dataclass(frozen=True)
class Asked:
    """record_steps, what, blocks, dtype: of the features for RF Edit. euler_first: the inverse of a last step of Euler's."""

    solver: str = "rf_solver"
    cfg: float = 1.0
    floor: float = 1e-3
    euler_first: bool = False
    record_steps: int = 4
    what: str = "v"
    blocks: str = LAST_THIRD
    dtype: str = "model"


def flow_sampling(model, name: str) -> Any:
    """The model's sampling. ValueError where it is no rectified flow."""
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.CONST):
        raise ValueError(
            f"{name} follows a rectified flow, and this MODEL ({type(model.model).__name__}) predicts otherwise. Use a flow model: "
            "FLUX, SD3, Wan, Qwen-Image, HunyuanVideo, LTX and the like."
        )
    return sampling


def schedule(sigmas: torch.Tensor, name: str) -> list[float]:
    """The sigmas as floats. ValueError where they do not fall to 0."""
    points = [float(s) for s in sigmas]
    if len(points) < 2 or points[-1] != 0 or any(b >= a for a, b in zip(points, points[1:], strict=False)):
        raise ValueError(
            f"{name} needs sigmas that fall from step to step and end at 0, the schedule of the edit to come; got {len(points)} "
            f"from {points[0] if points else 0:.4g} to {points[-1] if points else 0:.4g}. Use those of BasicScheduler."
        )
    return points


def invert(model, positive, negative, latent, sigmas: torch.Tensor, asked: Asked):
    """(NOISE, Bank, samples of the state reached as a latent [B, C, ...])."""
    sampling = flow_sampling(model, NAME)
    points = schedule(sigmas, NAME)
    if getattr(latent["samples"], "is_nested", False):
        raise ValueError(f"{NAME} takes one latent, and this one holds several (video and sound). Separate them first.")
    if asked.cfg != 1 and negative is None:
        raise ValueError(f"{NAME} at cfg {asked.cfg:g} needs a negative prompt. Connect one, or set cfg to 1.")
    if asked.record_steps > len(points) - 1:
        raise ValueError(
            f"record_steps {asked.record_steps} are more than the {len(points) - 1} steps of the sigmas. Lower it."
        )
    bank = Bank(tuple(points), asked.record_steps, asked.what, asked.dtype)
    records = asked.record_steps > 0
    used = (
        attach(model, RecordFeature(None, blocks=blocks_of(model, asked.blocks), bank=bank))
        if records
        else metered(model)
    )
    sampler = Inverter(asked.solver, asked.floor, asked.euler_first, bank)
    rising = sigmas.flip(0)
    whole = {key: value for key, value in latent.items() if key != "noise_mask"}  # LTX, Wan 2.2 5B read it themselves
    job = Job(positive, positive if negative is None else negative, whole, sampler, rising, Zeros(), asked.cfg)
    outcome = sample(used, job, Progress(len(points) - 1).step)
    if records and not bank.complete:
        raise ValueError(
            f"{NAME} could not record every block at every evaluation of the last {asked.record_steps} steps: a node on this MODEL "
            "skips some. Connect the MODEL as it is before that node, or set record_steps to 0."
        )
    scale = float(getattr(sampling, "noise_scale", 1.0))
    noise = InvertedNoise(sampler.reached, points[0], scale, model.get_model_object("latent_format"))
    return noise, bank, outcome.samples
