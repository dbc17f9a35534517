import pytest
import torch
from attention_helper import Exact, Nothing, Refuses, plan
from nodes_helper import Job, facts, model_of

from tessera.patching import work as m
from tessera.patching.report import latest_record


def test_flops_of_a_block_are_its_linear_layers_and_its_attention():
    """Wan's tiny block: 96 wide, four square layers in each of two attentions, an MLP of 128; 5 x 4 x 6 tokens."""
    model, spec = model_of("wan_meta")
    patched = plan(model, Nothing())
    Job(spec, steps=1, cfg=1.0)(patched)
    weights, tokens = 8 * 96 * 96 + 2 * 96 * 128, 5 * 4 * 6
    attention = 4 * 96 * tokens * tokens
    got = facts(patched, "Plan")
    # Nothing says that dense would have been N pairs; all of these it spares
    assert abs(got["flops_saved"] - 4 * 24 * tokens / (2 * weights * tokens + attention)) < 1e-6


def test_dense_attention_saves_nothing_and_one_call_is_timed():
    model, spec = model_of("flux")
    patched = plan(model, Exact())
    Job(spec, steps=2)(patched)
    told = facts(patched, "Plan")
    assert told["flops_saved"] == 0 and told["call_ms"] > 0 and told["dense_call_ms"] > 0


def test_a_plan_that_declines_times_nothing():
    model, spec = model_of("flux")
    patched = plan(model, Refuses())
    Job(spec, steps=2)(patched)
    assert "call_ms" not in facts(patched, "Plan") and facts(patched, "Plan")["flops_saved"] == 0


def test_timing_changes_no_bit():
    model, spec = model_of("flux")
    job, patched = Job(spec, steps=2), plan(model, Nothing())
    first = job(patched)
    line = next(f for f in latest_record(patched)["features"] if f["name"] == "Plan")["line"]
    assert "of the blocks' FLOPs saved" in line and torch.equal(first, job(patched))


def test_advice_only_where_dense_was_faster():
    assert m.advice({}) == "" and m.advice({"call_ms": 1.0, "dense_call_ms": 2.0}) == ""
    assert "raise min_tokens" in m.advice({"call_ms": 2.0, "dense_call_ms": 1.0})


def test_time_saved_follows_from_the_flops():
    model, spec = model_of("flux")
    patched = plan(model, Nothing())
    Job(spec, steps=2, cfg=1.0)(patched)
    told = facts(patched, "Plan")
    share, run = told["flops_saved"], latest_record(patched)["seconds"]
    assert 0 < share < 1 and told["seconds_saved"] == pytest.approx(run * share / (1 - share), rel=0.2, abs=2e-3)
