"""A job for Profile Model on a tiny model, and its report."""

import json

import comfy.samplers
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from nodes_helper import run_node
from tiny_models import conds, empty_latent

from tessera.nodes.measure.profile_model import ProfileModel
from tessera.patching.sampling import Job


def job_of(model, spec, steps=4, cfg=3.0):
    positive, negative = conds(spec)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    sampler, latent = comfy.samplers.sampler_object("euler"), {"samples": empty_latent(spec)}
    return Job(positive, negative, latent, sampler, sigmas, Noise_RandomNoise(7), cfg)


def profiled(model, spec, steps=4, cfg=3.0, **inputs):
    given = vars(job_of(model, spec, steps, cfg))
    made, text, report, image = run_node(ProfileModel, model=model, **{**given, "steps": 0, **inputs})
    assert made is model and json.loads(json.dumps(report, allow_nan=False)) == report
    assert text.splitlines() == report["lines"] and image.ndim == 4 and image.std() > 0.05
    return report
