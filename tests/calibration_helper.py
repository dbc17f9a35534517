"""What tests of nodes that sample for themselves share: a job's inputs, and one run of Calibrate Cache."""

import torch
from nodes_helper import run_node
from tiny_models import conds, empty_latent

import comfy.samplers  # isort: skip
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise  # isort: skip

from tessera.nodes.cache.calibrate_cache import CalibrateCache


def job_of(model, spec, steps=6, sampler="euler", batch=1, **inputs):
    positive, negative = conds(spec)
    latent = {"samples": torch.cat([empty_latent(spec)] * batch)}
    sampling = model.get_model_object("model_sampling")
    return {
        "positive": positive, "negative": negative, "latent": latent, "cfg": 3.0, "noise": Noise_RandomNoise(7),
        "sampler": comfy.samplers.sampler_object(sampler),
        "sigmas": comfy.samplers.calculate_sigmas(sampling, "simple", steps), **inputs,
    }  # fmt: skip


def calibrate(model, spec, seed=0, **options):
    return run_node(CalibrateCache, model=model, seed=seed, **job_of(model, spec, **options))
