"""The node on tiny video models: exactly the tiles of a frame and of the reference frames act."""

import pytest
import torch
from nodes_helper import Job, error, facts, model_of, run_node, taylor
from segments_helper import Masked

from tessera.methods.attention.tile import frames_of
from tessera.nodes.attention.attention_tile import AttentionTile
from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.patching.attention import AttentionFeature
from tessera.patching.run import attach

NAME = "Attention Tile"
VIDEO = ("wan_meta", "ltxv_meta", "hunyuan_video", "cosmos_predict2", "cogvideox", "kandinsky5")


def tile(model, **inputs):
    return run_node(AttentionTile, model=model, **{"min_tokens": 0, "ref_frames": 1, **inputs})[0]


def explicit(model, k=1, how="even", plan=None):
    def label(grid, block):
        count = k if plan is None else plan.get(block)
        return None if count is None else frames_of(grid, count, how)

    return attach(model, AttentionFeature(None, "Masked", method=Masked(label), min_tokens=0))


def job_of(spec, frames=4, **rest):
    return Job(spec, steps=2, latent=torch.zeros(1, spec.latent[1], frames, *spec.latent[-2:]), **rest)


@pytest.mark.parametrize("name", VIDEO)
def test_as_many_references_as_frames_change_nothing(name):
    model, spec = model_of(name)
    patched, job = tile(model, ref_frames=4), job_of(spec)
    assert torch.equal(job(patched), job(model))
    told = facts(patched, NAME)
    assert told["calls"] == told["declined"]["every frame sees every frame"] > 0 and told["pairs_fraction"] == 1


@pytest.mark.parametrize("how", ["even", "first", "last"])
@pytest.mark.parametrize("name", VIDEO)
def test_equals_the_explicit_mask(name, how):
    model, spec = model_of(name)
    patched, job = tile(model, ref_layout=how), job_of(spec, 5)
    got, want = job(patched), job(explicit(model, how=how))
    assert error(got, want) < 1e-4
    assert error(got, job(model)) > 1e-4, "the tiles must act"
    told = facts(patched, NAME)
    assert told["served"] == told["calls"] > 0 and 0 < told["pairs_fraction"] < 1


def test_pairs_are_those_of_the_formula():
    model, spec = model_of("wan_meta")
    patched = tile(model, ref_frames=2)
    job_of(spec, 8)(patched)
    assert facts(patched, NAME)["pairs_fraction"] == (2 * 8 + 6 * 3) / 64


@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_a_picture_stays_as_it_is(name):
    model, spec = model_of(name)
    job = Job(spec, steps=2)
    patched = tile(model)
    assert torch.equal(job(patched), job(model)) and set(facts(patched, NAME)["declined"]) == {"a single frame"}


def test_a_plan_gives_each_block_its_own_number():
    model, spec = model_of("wan_meta")
    patched, job = tile(model, plan='{"blocks": {"0": "dense", "2": 2}}'), job_of(spec, 5)
    assert error(job(patched), job(explicit(model, plan={2: 2}))) < 1e-4
    told = facts(patched, NAME)
    assert told["served"] == 2 and told["declined"] == {"outside the chosen blocks": 2, "dense in the plan": 2}
    some = tile(model, plan='{"0": 1, "2": 2}', blocks="1-2")
    job(some)
    assert facts(some, NAME)["served"] == 2 and facts(some, NAME)["declined"] == {"outside the chosen blocks": 4}


def test_a_plan_of_another_model_is_refused():
    model, _ = model_of("wan_meta")
    with pytest.raises(ValueError, match="blocks 0 to 2, there is no block 7"):
        tile(model, plan='{"0": 1, "7": 2}')
    with pytest.raises(ValueError, match="plan: cannot read"):
        tile(model, plan="2, 3")


def test_bf16():
    model, spec = model_of("wan_meta", "bf16")
    job = job_of(spec)
    assert error(job(tile(model)), job(explicit(model))) < 3e-2


def test_any_size_and_nothing_of_another_stays():
    model, spec = model_of("wan_meta")
    patched, job = tile(model), job_of(spec)
    first = job(patched)
    odd = Job(spec, steps=2, latent=torch.zeros(1, 16, 3, 9, 14))
    assert error(odd(patched), odd(explicit(model))) < 1e-4

    def stop(step):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        job_of(spec, on_step=stop)(patched)
    assert torch.equal(job(patched), first)


def test_beside_a_cache_a_lora_and_another_attention():
    model, spec = model_of("wan_meta")
    job = Job(spec, latent=torch.zeros(1, 16, 4, 8, 8))
    assert torch.equal(job(taylor(tile(model))), job(tile(taylor(model))))
    key = "diffusion_model.blocks.0.ffn.0.weight"
    changed = model.clone()
    changed.add_patches({key: ("diff", (torch.randn(model.model_state_dict()[key].shape) * 0.2,))}, 1.0)
    assert error(job(tile(changed)), job(explicit(changed))) < 1e-4
    both = run_node(LocalWindowAttention, model=tile(model, blocks="0"), radius=2, min_tokens=0, blocks="1-2")[0]
    job(both)
    assert (facts(both, NAME)["served"], facts(both, "Local Window Attention")["served"]) == (8, 16)


def test_a_foreign_override_underneath_keeps_the_other_blocks():
    from attention_helper import Foreign

    model, spec = model_of("wan_meta")
    foreign = Foreign(model)
    patched = tile(foreign.onto(model), blocks="1")
    with foreign.counting():
        job_of(spec, cfg=1.0)(patched)
    assert foreign.image == 2 * 2 and facts(patched, NAME)["served"] == 2


def test_a_model_that_cannot_be_served_says_so():
    model, spec = model_of("hunyuan3d2")
    with pytest.raises(ValueError, match="without places"):
        tile(model)
    job = Job(spec, steps=1)
    assert torch.equal(job(tile(model, unsupported="warn")), job(model))
