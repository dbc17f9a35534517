"""The Few-Step Sampler, and one run with a SAMPLER and SIGMAS as SamplerCustom would do it."""

import torch
from nodes_helper import run_node
from tiny_models import conds, empty_latent

import comfy.sample  # isort: skip

from tessera.nodes.sampling.few_step_sampler import FewStepSampler

SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.0])


def sampled(model, spec, sampler, cfg=1.0, batch=1, callback=None, seed=21, sigmas=SIGMAS):
    positive, negative = conds(spec)
    latent = torch.cat([empty_latent(spec)] * batch)
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample_custom(
        model, noise, cfg, sampler, sigmas, positive, negative, latent, disable_pbar=True, seed=seed, callback=callback
    )


def few(mode, gamma=0.5):
    return run_node(FewStepSampler, mode=mode, gamma=gamma)[0]
