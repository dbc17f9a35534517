"""What tests of block samplers share: a clip sampled block by block on a tiny model."""

import torch
from pack import use_comfyui

use_comfyui()

import comfy.sample
import comfy.samplers
from nodes_helper import run_node
from tiny_models import conds, empty_latent

from tessera.methods.video.blocks import renoise
from tessera.nodes.video.block_video_sampler import BlockVideoSampler
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


def node(model, **inputs):
    """(MODEL, SAMPLER, state) of a Block Video Sampler."""
    return run_node(BlockVideoSampler, model=model, **{"frames_per_block": 2, **inputs}).args


def made(model, spec, *, run=None, **inputs):
    """The latent that a Block Video Sampler with these inputs makes. run: how it is sampled."""
    patched, sampler, _ = node(model, **inputs)
    return sampled(patched, spec, sampler, **(run or {}))


@torch.inference_mode()
def masked(model, spec, boundaries, cfg=1.0, window=0, sink=0, sigmas=SIGMAS, seed=5):
    """The same clip from the bare network: all frames so far in one sequence, a time step for each of them, and a mask by
    which a frame sees its own block and what that block looks back on."""
    network, process = model.model.diffusion_model, model.model.process_latent_out
    x = comfy.sample.prepare_noise(clip(spec, boundaries[-1]), 1)
    prompts = [c[0][0] for c in conds(spec)]
    spans = list(zip(boundaries, boundaries[1:], strict=False))
    sees = torch.zeros(boundaries[-1], boundaries[-1], dtype=torch.bool)
    for number, (first, last) in enumerate(spans):
        start = boundaries[max(0, number - window)] if window else 0
        sees[first:last, start:last] = True
        sees[first:last, :sink] = True

    def predicted(clip_so_far, sigma, first):
        frames = clip_so_far.shape[2]
        tokens = clip_so_far.shape[3] * clip_so_far.shape[4] // 4
        mask = sees[:frames, :frames].repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)  # core's own attention adds it

        def override(func, q, k, v, *args, **kwargs):
            return func(q, k, v, *args, **{**kwargs, "mask": mask} if k.shape[1] == len(mask) else kwargs)

        times = torch.zeros(1, frames)
        times[:, first:] = sigma * 1000
        options = {"optimized_attention_override": override}
        v = [network(clip_so_far, times, prompt, transformer_options=options) for prompt in prompts]
        return clip_so_far - sigma * (v[1] + cfg * (v[0] - v[1]))

    for number, (first, last) in enumerate(spans):
        for i, sigma in enumerate(sigmas[:-1].tolist()):
            x0 = predicted(x[:, :, :last], sigma, first)[:, :, first:last]
            x[:, :, first:last] = renoise(x0, float(sigmas[i + 1]), seed, number, i)
    return process(x)
