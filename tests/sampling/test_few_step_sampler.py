"""Few-Step Sampler: equal to core's euler and lcm at its ends, and between them noise of the same variance."""

import logging

import pytest
import torch
from few_step_helper import few, sampled
from nodes_helper import error, model_of, taylor

import comfy.model_management  # isort: skip
import comfy.samplers  # isort: skip

from tessera.methods.sampling.few_step import mixed


@pytest.mark.parametrize(("name", "dtype"), [("flux", "fp32"), ("wan_meta", "fp32"), ("flux", "bf16")])
def test_its_ends_are_cores_samplers_bit_for_bit(name, dtype):
    model, spec = model_of(name, dtype)
    for mode, core in (("ode_jump", "euler"), ("renoise", "lcm")):
        want = sampled(model, spec, comfy.samplers.sampler_object(core))
        assert torch.equal(sampled(model, spec, few(mode)), want)
    assert torch.equal(sampled(model, spec, few("gamma", 0.0)), sampled(model, spec, few("ode_jump")))
    assert torch.equal(sampled(model, spec, few("gamma", 1.0)), sampled(model, spec, few("renoise")))
    half = sampled(model, spec, few("gamma", 0.5))
    assert torch.equal(half, sampled(model, spec, few("gamma", 0.5)))
    assert error(half, sampled(model, spec, few("ode_jump"))) > 1e-3 < error(half, sampled(model, spec, few("renoise")))
    assert error(half, sampled(model, spec, few("gamma", 0.5), seed=22)) > 1e-3


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.8, 1.0])
def test_the_mixed_noise_keeps_its_variance(gamma):
    clean, own, fresh = (torch.randn(1, 100_000, dtype=torch.float64) for _ in range(3))
    sigma = 0.6
    start = (1 - sigma) * clean
    got = mixed(start + sigma * own, start + sigma * fresh, start, gamma)
    assert float((got - start).std()) == pytest.approx(sigma, rel=1e-2)
    share = float(((got - start) * fresh).mean() / sigma)
    assert share == pytest.approx(gamma, abs=1e-2)


def test_a_discrete_model_is_noised_its_own_way():
    """x = x_0 + sigma noise, and not the flow's (1 - sigma) x_0."""
    from tessera.patching.few_step import FewSteps

    class Sampling:
        def noise_scaling(self, sigma, noise, latent):
            return latent + sigma * noise

    clean, noise = torch.randn(1, 9), torch.randn(1, 9)
    x = clean + 4.0 * noise
    made = FewSteps("gamma", 0.6).noised(Sampling(), x, clean, torch.zeros(1, 9), torch.tensor(4.0), torch.tensor(2.0))
    assert torch.allclose(made, clean + 2.0 * 0.8 * noise, atol=1e-5)


@pytest.mark.parametrize("mode", ["ode_jump", "renoise", "gamma"])
def test_batch_guidance_interrupt_and_cache(mode, caplog):
    model, spec = model_of("flux")
    plain = sampled(model, spec, few(mode), cfg=3.0)
    cached = taylor(model, interval=2)
    with caplog.at_level(logging.WARNING, logger="tessera"):
        first = sampled(cached, spec, few(mode), cfg=3.0)
    assert "cfg is 3" in caplog.text and "Taylor Cache skips steps" in caplog.text
    assert torch.equal(first, sampled(cached, spec, few(mode), cfg=3.0)) and error(first, plain) > 0
    assert torch.equal(sampled(taylor(model, interval=1), spec, few(mode), cfg=3.0), plain)

    def stop(step, *rest):
        if step == 1:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sampled(cached, spec, few(mode), cfg=3.0, callback=stop)
    assert torch.equal(sampled(cached, spec, few(mode), cfg=3.0), first)
    two = sampled(model, spec, few(mode), cfg=3.0, batch=2)
    assert torch.isfinite(two).all() and (mode != "ode_jump" or error(two[:1], plain) < 1e-4)


def test_nothing_is_said_where_all_is_well(caplog):
    model, spec = model_of("flux")
    with caplog.at_level(logging.WARNING, logger="tessera"):
        sampled(model, spec, few("renoise"), cfg=1.0)
    assert "Few-Step Sampler" not in caplog.text


def test_the_largest_seed():
    model, spec = model_of("flux")
    assert sampled(model, spec, few("renoise"), seed=2**64 - 1).isfinite().all()
