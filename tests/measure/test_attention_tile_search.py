"""The search on tiny video models: the run it samples is the plain one, and its plan is what Attention Tile takes."""

import json

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from nodes_helper import NODE_ID, Job, error, facts, model_of, run_node, taylor
from tiny_models import conds, empty_latent

from tessera.methods.attention.tile import kept_tiles, parse_plan
from tessera.nodes.attention.attention_tile import AttentionTile
from tessera.nodes.measure.attention_tile_search import AttentionTileSearch

NAME = "Attention Tile Search"


def latent_of(spec, frames=5):
    return torch.zeros(1, spec.latent[1], frames, *spec.latent[-2:])


def search(model, spec, steps=3, latent=None, **inputs):
    positive, negative = conds(spec)
    latent = latent_of(spec) if latent is None else latent
    inputs = {
        "positive": positive, "negative": negative, "latent": {"samples": latent}, "cfg": 3.0, "noise": Noise_RandomNoise(7),
        "sampler": comfy.samplers.sampler_object("euler"), "candidates": "1,2,3",
        "sigmas": comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps), **inputs,
    }  # fmt: skip
    return run_node(AttentionTileSearch, model=model, **inputs)


def losses(report):
    rows = report["features"][0]["facts"]["loss_by_reference_frames"]
    return {
        int(n[6:]): {int(k): float(x) for k, x in (e.split(": ") for e in row.split(", "))} for n, row in rows.items()
    }


@pytest.mark.parametrize("name", ["wan_meta", "ltxv_meta", "hunyuan_video", "cogvideox"])
def test_the_run_is_the_plain_one_and_the_plan_is_taken(name):
    model, spec = model_of(name)
    out = search(model, spec, threshold=0.5)
    plan, made, report = out
    assert torch.equal(made["samples"], Job(spec, steps=3, latent=latent_of(spec))(model))
    assert out.ui == {"tessera_report": [report]} and report["kind"] == "tile_search"
    assert report["features"][0]["node"] == NODE_ID
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    blocks, found = parse_plan(plan), losses(report)
    assert sorted(blocks) == sorted(found) and len(blocks) > 0
    for n, k in blocks.items():
        fits = [c for c, loss in found[n].items() if loss < 0.5]
        assert k == (min(fits) if fits else None)
    tiled = run_node(AttentionTile, model=model, plan=plan, min_tokens=0)[0]
    Job(spec, steps=2, latent=latent_of(spec))(tiled)
    told = facts(tiled, "Attention Tile")
    planned = sum(1 if k is None else kept_tiles(5, k) / 25 for k in blocks.values()) / len(blocks)
    assert report["features"][0]["facts"]["planned_fraction"] == pytest.approx(planned, abs=1e-6)
    assert told["served"] == 2 * sum(k is not None for k in blocks.values())
    assert json.loads(search(model, spec, threshold=0.0)[0])["blocks"] == dict.fromkeys(map(str, blocks), "dense")


def test_a_density_is_kept():
    model, spec = model_of("wan_meta")
    for density in (0.9, 0.7, 0.55):
        report = search(model, spec, budget="density", density=density)[2]
        assert report["features"][0]["facts"]["planned_fraction"] <= density and report["notes"] == []
    plan, _, report = search(model, spec, budget="density", density=0.1)
    assert set(parse_plan(plan).values()) == {1} and "add smaller candidates" in report["notes"][0]
    assert set(parse_plan(search(model, spec, budget="density", density=1.0)[0]).values()) == {None}


def test_it_measures_what_the_masks_lose():
    """A single block made sparse in a single step: its own loss is what an explicit mask gives."""
    from attention_helper import plan as planned
    from segments_helper import masked, seen, whole

    from tessera.methods.attention.call import Decline
    from tessera.methods.attention.tile import frames_of

    model, spec = model_of("wan_meta")
    found: dict = {}

    class Watch:
        def begin(self):
            return None

        def attend(self, state, call):
            mask = seen(whole(call.layout, frames_of(call.layout.grid, 2)))
            full, cut = masked(call, torch.ones_like(mask)), masked(call, mask)
            loss = ((cut - full).square().sum() / full.square().sum()).item()
            found.setdefault(call.block.number, []).append(loss)
            raise Decline("seen")

    Job(spec, steps=3, latent=latent_of(spec))(planned(model, Watch()))
    told = losses(search(model, spec, probe_steps=3)[2])
    assert {n: row[2] for n, row in told.items()} == pytest.approx(
        {n: sum(x) / len(x) for n, x in found.items()}, abs=1e-4
    )


def test_two_searches_agree_and_leave_nothing():
    model, spec = model_of("wan_meta")
    plain = Job(spec, steps=3)(model)
    first, again = (search(model, spec)[0] for _ in range(2))
    assert first == again and torch.equal(Job(spec, steps=3)(model), plain)
    assert "tessera_features" not in model.model_options.get("transformer_options", {})


def test_beside_a_cache_and_in_bf16():
    model, spec = model_of("wan_meta", "bf16")
    cached = taylor(model)
    out = search(cached, spec, steps=8, probe_steps=16)
    assert error(out[1]["samples"], Job(spec, steps=8, latent=latent_of(spec))(cached)) == 0
    assert len(losses(out[2])) == 3 and out[2]["features"][1]["name"] == "Taylor Cache"


def test_a_cancel_goes_through():
    model, spec = model_of("wan_meta")
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        search(model, spec)
    assert search(model, spec)[0]


def test_what_has_nothing_to_measure_is_told():
    for name, latent in (("flux", None), ("wan_meta", 1)):
        model, spec = model_of(name)
        latent = empty_latent(spec) if latent is None else latent_of(spec, latent)
        with pytest.raises(ValueError, match=r"no attention to measure \(a single frame\).*at least 2 latent frames"):
            search(model, spec, latent=latent)
    model, spec = model_of("hunyuan3d2")
    with pytest.raises(ValueError, match="without places"):
        search(model, spec, latent=empty_latent(spec))
    model, spec = model_of("wan_meta")
    with pytest.raises(ValueError, match="at least 2 sigmas, got 1"):
        search(model, spec, sigmas=torch.tensor([1.0]))


@pytest.mark.parametrize("text", ["", "0,1", "a", "1;2", "1,,2", ",".join(map(str, range(1, 19)))])
def test_candidates_that_cannot_be_read(text):
    model, spec = model_of("wan_meta")
    with pytest.raises(ValueError, match="candidates: cannot read"):
        search(model, spec, candidates=text)
