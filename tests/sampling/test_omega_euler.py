"""Omega Euler: omega 0 is core's Euler, other values its formula, and masked places arrive at their latent."""

import comfy.samplers
import pytest
import torch
from flow_helper import Keep, digits, guider_of, half, run, sample, schedule, word
from nodes_helper import error, facts, model_of, run_node, taylor

from tessera.methods.sampling.flow import omega_scale
from tessera.nodes.sampling.omega_euler import OmegaEuler

EULER = comfy.samplers.sampler_object("euler")


def sampler(omega=10.0):
    return run_node(OmegaEuler, omega=omega)[0]


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_omega_0_is_cores_euler(name):
    model, spec = model_of(name)
    assert torch.equal(run(model, spec, sampler(0.0), schedule(4)), run(model, spec, EULER, schedule(4)))


@pytest.mark.parametrize("omega", [10.0, -20.0])
def test_a_step_by_hand(omega):
    model, spec = model_of("flux")
    keep, sigmas = Keep(), schedule(3)
    run(model, spec, sampler(omega), sigmas, callback=keep, batch=2)
    dx = (sigmas[1] - sigmas[0]) * (keep.x[0] - keep.clean[0]) / sigmas[0]
    mean = dx.mean((1, 2, 3), keepdim=True)
    assert error(keep.x[1], keep.x[0] + (dx - mean) * omega_scale(omega) + mean) < 1e-6
    assert error(keep.x[1], keep.x[0] + dx) > 1e-3


def test_rows_of_a_batch_do_not_know_of_each_other():
    model, spec = model_of("flux")
    two = torch.randn(2, *spec.latent[1:], generator=torch.Generator().manual_seed(3))

    class Rows:
        seed = 7

        def generate_noise(self, latent):
            return latent["samples"].flip(-1)

    both = run(model, spec, sampler(), schedule(3), latent=two, noise=Rows())
    each = [run(model, spec, sampler(), schedule(3), latent=row[None], noise=Rows()) for row in two]
    assert error(both, torch.cat(each)) < 1e-5


def test_masked_places_arrive_at_their_latent():
    model, spec = model_of("flux")
    latent = torch.randn(spec.latent, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 1, *spec.latent[2:])
    mask[..., :5] = 1
    out = run(model, spec, sampler(), schedule(4), latent=latent, mask=mask)
    assert error(out[..., 5:], latent[..., 5:]) < 1e-5
    assert error(out, run(model, spec, EULER, schedule(4), latent=latent, mask=mask)) > 1e-3


def test_beside_taylor_cache():
    model, spec = model_of("flux")
    cached = taylor(model)
    out = run(cached, spec, sampler(), schedule(8))
    assert torch.equal(out, run(cached, spec, sampler(), schedule(8)))
    assert [d["step"] for d in facts(cached)["decisions"]] == list(range(8))


def test_bfloat16_is_near_full_precision():
    empty = torch.zeros(1, 16, 16, 16)
    each = [sample(guider_of(m, word("two")), sampler(), schedule(4), empty) for m in (half(), digits())]
    assert 0 < error(*each) < 0.05
