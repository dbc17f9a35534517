"""Run Report: the newest facts of exactly this MODEL, or a sentence."""

import json

import pytest
import torch
from nodes_helper import NODE_ID, Job, model_of, run_node, taylor, watching

from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.nodes.measure.run_report import RunReport
from tessera.patching.report import CHANGED

LATENT = {"samples": torch.zeros(1, 16, 8, 12)}


def report(model, samples=None):
    return run_node(RunReport, model=model, latent=LATENT if samples is None else {"samples": samples})


def test_needs_one_of_our_nodes():
    model, spec = model_of("flux")
    Job(spec, steps=1)(model)
    with pytest.raises(
        ValueError, match="found no Tessera node on this MODEL; connect the MODEL that the sampler uses"
    ):
        report(model)


def test_needs_a_run():
    model, spec = model_of("flux")
    patched = taylor(model)
    with pytest.raises(ValueError, match="found no finished run on this MODEL; connect the latent of the sampler"):
        report(patched)
    Job(spec, steps=2)(taylor(model))  # another MODEL's run is not this one's
    with pytest.raises(ValueError, match="no finished run on this MODEL"):
        report(patched)


@pytest.mark.parametrize("name", ["flux", "wan_meta", "sd3", "lumina2"])
def test_facts_of_the_newest_run(name):
    model, spec = model_of(name)
    patched = run_node(LocalWindowAttention, model=taylor(model), radius=2, min_tokens=0)[0]
    Job(spec, steps=3)(patched)
    with watching(model) as watch:
        Job(spec)(patched)
    out = report(patched)
    latent, record = out[0], out[1]
    assert latent is LATENT and out.ui == {"tessera_report": [record]}
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["ended"] == "finished" and record["seconds"] > 0 and record["known"]
    assert (record["steps"], record["evaluations"], record["forwards"]) == (8, 8, 8)
    cache, attention = record["features"]
    assert (cache["name"], cache["node"]) == ("Taylor Cache", NODE_ID)
    assert cache["facts"]["blocks_computed"] == cache["facts"]["blocks_skipped"] == watch.blocks
    assert cache["line"].startswith("forecast 4 of 8 evaluations, held ")
    assert attention["name"] == "Local Window Attention" and attention["facts"]["served"] >= watch.blocks
    assert attention["line"].startswith(f"served {attention['facts']['served']} of ")


def test_two_clones_share_the_run_and_lora_tells_them_apart():
    model, spec = model_of("flux")
    patched = taylor(model)
    key = "diffusion_model.img_in.weight"
    changed = patched.clone()
    changed.add_patches({key: ("diff", (torch.ones_like(model.model_state_dict()[key]),))}, 0.1)
    made = Job(spec, steps=4)(patched)
    Job(spec, steps=6)(changed)
    assert report(patched)[1]["steps"] == 4 and report(changed)[1]["steps"] == 6
    assert report(patched.clone(), made)[1] is report(patched, made)[1]


@pytest.mark.parametrize("name", ["flux", "wan_meta", "ltxav_meta"])
def test_the_run_that_made_the_latent(name):
    """Two samplers on one MODEL, then their reports: each finds its own run, however the latent was stored since."""
    model, spec = model_of(name)
    patched = taylor(model, level="output")
    made = {steps: Job(spec, steps=steps)(patched) for steps in (3, 5)}
    for steps, samples in made.items():
        record = report(patched, samples)[1]
        assert record["steps"] == steps and "notes" not in record
        if name != "ltxav_meta":
            assert report(patched, samples.half())[1]["steps"] == steps
            assert report(patched, samples.clone())[1]["steps"] == steps


def test_a_latent_of_no_run_gets_the_newest_facts_and_says_so():
    model, spec = model_of("flux")
    patched = taylor(model)
    samples = [Job(spec, steps=steps)(patched) for steps in (3, 5)][0]
    for other in (samples[..., :-1], samples + 1):
        record = report(patched, other)[1]
        assert record["steps"] == 5 and record["notes"] == [CHANGED]
