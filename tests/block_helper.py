"""What tests of block samplers share: a clip sampled block by block on a tiny model."""

import torch
from pack import use_comfyui

use_comfyui()

import comfy.sample
import comfy.samplers
from tiny_models import conds, empty_latent

from tessera.patching.block_memory import BlockMemory

SIGMAS = torch.tensor([1.0, 0.8, 0.4, 0.0])


class Nothing(BlockMemory):
    """Blocks that know nothing of each other."""

    def __init__(self):
        self.opened = []

    def open(self, options, block):
        self.opened.append((block.first, block.last, block.commit))

    def finished(self, block):
        pass

    def state(self):
        return {}, {}

    def restore(self, tensors, facts, device):
        pass

    def held_bytes(self):
        return 0


def euler():
    """SAMPLER."""
    return comfy.samplers.ksampler("euler")


def clip(spec, frames: int, batch: int = 1) -> torch.Tensor:
    """An empty latent of so many frames."""
    latent = empty_latent(spec)
    return latent.new_zeros(batch, latent.shape[1], frames, *latent.shape[3:])


def sampled(model, spec, sampler, frames=4, cfg=1.0, sigmas=SIGMAS, seed=5, batch=1, latent=None, mask=None, callback=None,
            positive=None):  # fmt: skip
    """The latent that this SAMPLER makes."""
    latent = clip(spec, frames, batch) if latent is None else latent
    own, negative = conds(spec)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(own if positive is None else positive, negative)
    guider.set_cfg(cfg)
    noise = comfy.sample.prepare_noise(latent, 1)
    return guider.sample(
        noise, latent, sampler, sigmas, denoise_mask=mask, callback=callback, disable_pbar=True, seed=seed
    )
