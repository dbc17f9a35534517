"""A tiny random SANA-Video, saved as its release is, and diffusers' own class with the same weights."""

import functools
import tempfile
from pathlib import Path

import comfy.sample
import comfy.samplers
import diffusers_helper as tiny
import torch

from tessera.patching.sana_video_load import load

NAME = "SanaVideoTransformer3DModel"
SIDES = (4, 6)  # of the latent


@functools.cache
def _loaded():
    with tempfile.TemporaryDirectory() as root:
        made = load(str(tiny.save(NAME, Path(root))))
        for key, value in made.model.diffusion_model.state_dict().items():
            value.copy_(tiny.plain(NAME).state_dict()[key])  # the mapped file goes
        return made


def model():
    """A patchable clone."""
    return _loaded().clone()


def network():
    return _loaded().model.diffusion_model


def empty(frames: int, batch: int = 1) -> torch.Tensor:
    return torch.zeros(batch, 16, frames, *SIDES)


def sampled(made, sampler, frames: int = 4, sigmas=None, cfg: float = 1.0, batch: int = 1, seed: int = 3, **more):
    """The latent that this SAMPLER makes, in the model's space."""
    latent = more.pop("latent", empty(frames, batch))
    guider = comfy.samplers.CFGGuider(made)
    negative = more.pop("negative", tiny.conditioning(NAME, seed=tiny.NEGATIVE))
    guider.set_conds(more.pop("positive", tiny.conditioning(NAME)), negative)
    guider.set_cfg(cfg)
    noise = comfy.sample.prepare_noise(latent[:1], 1).repeat(len(latent), 1, 1, 1, 1)
    levels = torch.tensor([1.0, 0.75, 0.5, 0.0]) if sigmas is None else sigmas
    with torch.inference_mode():
        out = guider.sample(noise, latent, sampler, levels, disable_pbar=True, seed=seed, **more)
    return guider.model_patcher.model.process_latent_in(out)
