"""Attention modules that no override reaches: PixArt, ERNIE-Image and HunyuanDiT."""

import pytest
import torch
from attention_helper import Exact, Foreign, Nothing, Refuses, plan
from nodes_helper import Job, error, facts, model_of
from tiny_models import build_direct
from tiny_specs import HUNYUAN_DIT

from tessera import archs
from tessera.patching.blocks import positions
from tessera.patching.reach import ReachedForward

NAMES = ["pixart", "ernie", "hunyuan_dit"]


def depth_of(model):
    diffusion_model = model.model.diffusion_model
    return len(positions(archs.find(diffusion_model), diffusion_model))


def reached(name):
    return (build_direct(HUNYUAN_DIT), HUNYUAN_DIT) if name == "hunyuan_dit" else model_of(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_self_attention_is_served_and_nothing_stays(name):
    model, spec = reached(name)
    job = Job(spec, steps=2)
    want = job(model)
    patched = plan(model, Exact())
    assert error(job(patched), want) < 1e-4
    told, depth = facts(patched, "Plan"), depth_of(model)
    assert told["served"] == told["calls"] > 0 and told["served"] % depth == 0
    assert error(job(plan(model, Nothing())), want) > 1e-3
    assert torch.equal(job(plan(model, Refuses())), want)
    assert torch.equal(job(model), want)
    modules = model.model.diffusion_model.modules()
    assert not [m for m in modules if isinstance(vars(m).get("forward"), ReachedForward)]


def test_an_override_that_never_reached_the_model_still_does_not():
    model, spec = reached("pixart")
    job = Job(spec, steps=1)
    foreign = Foreign(model, scale=0.5)
    got = job(plan(foreign.onto(model), Refuses()))
    assert foreign.calls == 0 and torch.equal(got, job(model))


def test_a_forward_that_another_pack_exchanged_is_left_alone():
    model, spec = reached("pixart")
    job, path = Job(spec, steps=1), "diffusion_model.blocks.0.attn.forward"
    theirs = model.clone()
    original = theirs.get_model_object(path)
    theirs.add_object_patch(path, lambda *args, **kwargs: 0.5 * original(*args, **kwargs))
    patched = plan(theirs, Exact())
    assert error(job(patched), job(theirs)) < 1e-4
    assert facts(patched, "Plan")["served"] == depth_of(model) - 1


def test_an_exchanged_dense_backend_is_called(monkeypatch):
    import comfy.ldm.pixart.blocks as theirs

    model, spec = reached("pixart")
    patched, seen, dense = plan(model, Refuses()), [], theirs.optimized_attention
    monkeypatch.setattr(theirs, "optimized_attention", lambda *a, **k: seen.append(1) or dense(*a, **k))
    Job(spec, steps=1)(patched)
    assert len(seen) >= depth_of(model)
