"""The attention dispatcher on every tiny model: an exact method in our place must change nothing, and serve all."""

import pytest
import torch
from attention_helper import Exact, Foreign, Nothing, Refuses, plan
from nodes_helper import Job, error, facts, model_of
from tiny_models import conds
from tiny_specs import SPECS

from tessera import archs
from tessera.patching.blocks import positions
from tessera.patching.report import latest_record


@pytest.mark.parametrize("name", SPECS)
def test_exact_attention_in_our_place(name):
    model, spec = model_of(name)
    arch = archs.find(model.model.diffusion_model)
    if "attention" in arch.limits:
        with pytest.raises(ValueError, match=f"cannot act here: {arch.name}"):
            plan(model, Exact())
        return
    job = Job(spec, steps=2)
    foreign = Foreign(model)
    with foreign.counting():
        want = job(foreign.onto(model))
    patched = plan(model, Exact())
    got = job(patched)
    told = facts(patched, "Plan")
    depth = len(positions(arch, model.model.diffusion_model))
    reached = foreign.image if arch.override else depth * latest_record(patched)["forwards"]
    assert reached > 0 and told["served"] >= 0.95 * reached
    assert told["calls"] == told["served"] + sum(told["declined"].values())
    assert error(got, want) < 1e-4
    zeros = plan(model, Nothing())
    assert error(job(zeros), want) > 1e-3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["flux", "wan_meta", "sd3", "lumina2"])
def test_a_plan_that_declines_is_not_there(name, dtype):
    model, spec = model_of(name, dtype)
    patched, job = plan(model, Refuses()), Job(spec, steps=2)
    assert torch.equal(job(patched), job(model))
    told = facts(patched, "Plan")
    assert told["served"] == 0 and told["declined"] == {"not today": told["calls"]} and told["calls"] > 0


def test_newest_plan_first_then_the_next():
    model, spec = model_of("flux")
    job, depth = Job(spec, steps=2), 4
    both = plan(plan(model, Exact(), "Old"), Nothing(), "New")
    assert torch.equal(job(both), job(plan(model, Nothing(), "New")))
    assert facts(both, "Old")["calls"] == 0 and facts(both, "New")["served"] == 2 * depth
    shared = plan(plan(model, Exact(), "Old"), Nothing(), "New", blocks=frozenset({0, 3}))
    job(shared)
    assert facts(shared, "New")["declined"] == {"outside the chosen blocks": 4}
    assert facts(shared, "New")["served"] == facts(shared, "Old")["served"] == 4
    refused = plan(plan(model, Exact(), "Old"), Refuses(), "New")
    job(refused)
    assert facts(refused, "Old")["served"] == facts(refused, "New")["declined"]["not today"] == 2 * depth


def test_declines_are_counted_with_their_reason():
    model, spec = model_of("flux")
    small = plan(model, Exact(), min_tokens=25)
    Job(spec, steps=2)(small)
    assert facts(small, "Plan")["declined"] == {"fewer than 25 image tokens": 8}
    fits = plan(model, Exact(), min_tokens=24)  # 8 x 12 latent, patches of 2
    Job(spec, steps=2)(fits)
    assert facts(fits, "Plan")["served"] == 8
    early = plan(model, Exact(), sigma_percent=(0.0, 0.45))
    Job(spec, steps=10)(early)
    told = facts(early, "Plan")
    assert told["served"] + told["declined"]["outside the chosen steps"] == 40 and 0 < told["served"] < 40
    line = next(f for f in latest_record(early)["features"] if f["name"] == "Plan")["line"]
    assert line.startswith(f"served {told['served']} of 40 calls") and "outside the chosen steps" in line


def test_dense_steps_and_blocks_at_either_end():
    model, spec = model_of("flux")
    steps = plan(model, Exact(), dense_steps=(1, 2))
    Job(spec, steps=4, cfg=1.0)(steps)
    assert facts(steps, "Plan")["served"] == 4 and facts(steps, "Plan")["declined"] == {"outside the chosen steps": 12}
    seen = []

    class Notes(Exact):
        def attend(self, state, call):
            seen.append(call.block.number)
            return super().attend(state, call)

    Job(spec, steps=1, cfg=1.0)(plan(model, Notes(), dense_blocks=(1, 2)))
    assert seen == [1]
    with pytest.raises(ValueError, match="leave none of the 4 blocks"):
        plan(model, Exact(), dense_blocks=(2, 2))


@pytest.mark.parametrize(("name", "kind", "other"), [("flux", "joint", "self"), ("wan_meta", "self", "joint")])
def test_scope_chooses_the_kind_of_call(name, kind, other):
    model, spec = model_of(name)
    job = Job(spec, steps=1)
    taken, left = plan(model, Nothing(), scope=kind), plan(model, Nothing(), scope=other)
    assert torch.equal(job(taken), job(plan(model, Nothing()))) and torch.equal(job(left), job(model))
    assert set(facts(left, "Plan")["declined"]) == {"outside the chosen scope"}


def test_references_and_guides():
    """Flux's reference latents follow the image; LTX guide frames make the layout unknown, so calls are declined."""
    model, spec = model_of("flux")
    reference = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(2))
    positive, negative = ([[c, {**e, "reference_latents": [reference]}]] for ((c, e),) in conds(spec))
    job = Job(spec, steps=2, positive=positive, negative=negative)
    patched = plan(model, Exact())
    assert error(job(patched), job(model)) < 1e-4
    assert facts(patched, "Plan")["served"] == 8

    model, spec = model_of("ltxv_meta")
    guides = torch.zeros(1, 3, 24, 2)
    positive, negative = ([[c, {**e, "keyframe_idxs": guides}]] for ((c, e),) in conds(spec))
    mask = torch.ones(1, 1, *spec.latent[2:])
    job = Job(spec, steps=2, positive=positive, negative=negative, mask=mask)
    patched = plan(model, Exact())
    assert torch.equal(job(patched), job(model))
    assert facts(patched, "Plan")["declined"] == {"token layout unknown": 4}
