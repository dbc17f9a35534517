"""RelaCtrl beside caches, attention and other controls; and what it holds, while it runs and after it."""

import gc
import weakref

import comfy.model_management
import pytest
import torch
from nodes_helper import error, facts, run_node, taylor
from relactrl_helper import CONTROL, LATENT, WIDTH, controlled, job, pixart

from tessera import archs
from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.nodes.cache.dynamic_grain import DynamicGrain
from tessera.nodes.cache.dynamic_tokens import DynamicTokens
from tessera.nodes.cache.region_adaptive_sampling import RegionAdaptiveSampling
from tessera.nodes.cache.step_cache import StepCache
from tessera.patching.run import FEATURES, Run

NAME = "Apply RelaCtrl"


@pytest.mark.parametrize("cache", [{}, {"level": "output"}], ids=["last block", "output"])
def test_beside_a_cache_in_both_orders(cache):
    """Off it changes nothing; on, a forecast evaluation computes no control block."""
    model, run = pixart(), job(steps=6)
    want = run(controlled(model))
    assert torch.equal(run(taylor(controlled(model), interval=1, **cache)), want)
    one, two = taylor(controlled(model), **cache), controlled(taylor(model, **cache))
    first = run(one)
    assert torch.equal(run(two), first) and torch.isfinite(first).all()
    for patched in (one, two):
        full = sum(d["kind"] == "full" for d in facts(patched)["decisions"])
        assert (
            facts(patched, NAME)["control_blocks"] == 11 * full < 66 and facts(patched, NAME)["residuals_reused"] == 0
        )


@pytest.mark.parametrize("last_blocks", [1, 6])
def test_last_blocks_after_skipped_control_blocks_get_the_last_residual(last_blocks):
    """What the cache fills in is from an earlier evaluation, and so is the residual that was added to it."""
    model, run = pixart(), job(steps=6)
    settings = {"policy": "DBCache", "threshold": 10.0, "first_blocks": 1, "last_blocks": last_blocks, "warmup": 2}
    cached = run_node(StepCache, model=controlled(model), **settings)[0]
    got = run(cached)
    told = facts(cached, NAME)
    skipped = sum(d["kind"] != "full" for d in facts(cached, "Step Cache")["decisions"])
    assert skipped > 0 and torch.isfinite(got).all()
    assert told["residuals_reused"] == skipped * last_blocks
    assert error(got, run(controlled(model))) < 0.5 * error(run(model), run(controlled(model)))


def test_beside_attention_and_dropped_mlp_tokens():
    model, run = pixart(), job()
    want = run(controlled(model))
    whole = run_node(LocalWindowAttention, model=controlled(model), radius=64, min_tokens=0)[0]
    assert torch.equal(run(whole), want) and facts(whole, "Local Window Attention")["calls"] > 0
    for both in (
        run_node(DynamicTokens, model=controlled(model))[0],
        controlled(run_node(DynamicTokens, model=model)[0]),
    ):
        assert torch.isfinite(run(both)).all() and facts(both, NAME)["control_blocks"] == 22


@pytest.mark.parametrize("node", [RegionAdaptiveSampling, DynamicGrain])
def test_what_does_nothing_on_pixart_takes_nothing_away(node):
    model = pixart()
    want = job(1)(controlled(model))
    assert torch.equal(job(1)(controlled(run_node(node, model=model, unsupported="warn")[0])), want)
    assert torch.equal(job(1)(run_node(node, model=controlled(model), unsupported="warn")[0]), want)


def test_two_conditions_add_up_on_one_model():
    model, run = pixart(), job()
    both = run(controlled(controlled(model), LATENT.flip(-1)))
    alone = [run(controlled(model, latent)) for latent in (LATENT, LATENT.flip(-1))]
    assert torch.isfinite(both).all() and all(error(both, one) > 1e-3 for one in alone)
    assert torch.equal(run(controlled(controlled(model, strength=0.0))), alone[0])


@pytest.mark.parametrize("how", ["finished", "interrupted", "error"])
def test_nothing_outlives_a_run(how, monkeypatch):
    model = pixart()
    plain, patched = job()(model), controlled(model)
    want = job()(patched)
    kept = []
    feature = type(patched.model_options["transformer_options"][FEATURES][-1])
    begin = feature.begin
    monkeypatch.setattr(feature, "begin", lambda self, run: kept.append(state := begin(self, run)) or state)

    def on_step(step):
        assert kept[0].weights and kept[0].tokens and kept[0].draws
        if how == "error":
            raise OSError("stop")
        if how == "interrupted":
            raise comfy.model_management.InterruptProcessingException

    expected = {"error": OSError, "interrupted": comfy.model_management.InterruptProcessingException}
    if how in expected:
        with pytest.raises(expected[how]):
            job(on_step=on_step)(patched)
    else:
        job(on_step=on_step)(patched)
    gone = weakref.ref(kept.pop())
    gc.collect()
    assert gone() is None
    assert torch.equal(job()(patched), want) and torch.equal(job()(model), plain)


def test_what_it_holds_counts_in_the_memory_estimate():
    model = pixart()
    patched = controlled(model)
    feature = patched.model_options["transformer_options"][FEATURES][-1]
    base = model.model
    run = Run((feature,), None, base, {}, archs.find(base.diffusion_model), patcher=model, dtype=torch.float32)
    run.states[feature] = feature.begin(run)
    told = feature.held_bytes(run, (1, 4, 32, 40), {"positive": [{}], "negative": [{}]})
    tokens, size = 320, 4
    permutations = 11 * (8 * WIDTH + 4 * tokens * WIDTH)
    assert told == size * (CONTROL.parameters + 5 * tokens * WIDTH) + permutations
    off = controlled(model, strength=0.0).model_options["transformer_options"][FEATURES][-1]
    assert off.held_bytes(run, (1, 4, 32, 40), {}) == 0
