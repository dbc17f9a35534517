"""What tests of samplers share: SamplerCustomAdvanced on a tiny model, and the digit model with its words."""

import atexit
import functools

import comfy.samplers
import torch
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from nodes_helper import conds, empty_latent
from pack import ROOT
from tiny_models import load

from tessera.nodes.digits.digits_prompt import DigitsPrompt


def schedule(steps: int, start: float = 1.0) -> torch.Tensor:
    """Even sigmas from start to 0."""
    return torch.linspace(start, 0, steps + 1)


class Keep:
    """A callback that keeps what the sampler tells."""

    def __init__(self):
        self.steps, self.clean, self.x = [], [], []

    def __call__(self, step, x0, x, total):
        self.steps.append(step)
        self.clean.append(x0.clone())
        self.x.append(x.clone())


def guider_of(model, positive, negative=None, cfg=1.0):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, positive if negative is None else negative)
    guider.set_cfg(cfg)
    return guider


def sample(guider, sampler, sigmas, latent, noise=None, mask=None, callback=None):
    """What SamplerCustomAdvanced does: the latent [B, C, ...] at the end."""
    noise = Noise_RandomNoise(7) if noise is None else noise
    given = {"samples": latent}
    return guider.sample(noise.generate_noise(given), latent, sampler, sigmas, denoise_mask=mask, callback=callback,
                         disable_pbar=True, seed=noise.seed)  # fmt: skip


def run(model, spec, sampler, sigmas, cfg=3.0, latent=None, batch=1, **rest):
    """The same with a spec's own prompts, from an empty latent unless one is given."""
    positive, negative = conds(spec)
    latent = empty_latent(spec) if latent is None else latent
    return sample(guider_of(model, positive, negative, cfg), sampler, sigmas, torch.cat([latent] * batch), **rest)


@functools.cache
def digits():
    """The digit model. Clone it before patching."""
    return load(ROOT / "models/digits_flux.safetensors")


atexit.register(digits.cache_clear)  # ComfyUI's ModelPatcher cannot be collected after its modules


def half():
    """The digit model, computing in bfloat16."""
    model = digits().clone()
    model.set_model_compute_dtype(torch.bfloat16)
    return model


@functools.cache
def word(text: str):
    return DigitsPrompt.execute(text=text).args[0][0]
