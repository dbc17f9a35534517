"""The node on tiny models: what it suggests holds when it is measured again, and the MODEL keeps nothing."""

import gc
import json
import math

import pytest
import torch
from nodes_helper import Job, model_of, run_node, taylor
from tiny_models import conds, empty_latent

import comfy.model_management  # isort: skip
import comfy.samplers  # isort: skip
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise  # isort: skip

from tessera.methods.measure.patterns import PATTERNS
from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.nodes.measure.attention_probe import AttentionProbe
from tessera.patching import probe as m
from tessera.patching.run import Run

JOB = ("positive", "negative", "latent", "noise", "sampler")
SERVED = ("flux", "wan_meta", "sd3", "ltxv_meta", "qwen_image", "lumina2", "cosmos_predict2", "hunyuan_video", "lens",
          "pixart", "ernie")  # fmt: skip


def probe(model, spec, steps=3, **inputs):
    positive, negative = conds(spec)
    latent = empty_latent(spec)
    shape = [*latent.shape]
    shape[-2] = 3 * shape[-2]
    sampling = model.get_model_object("model_sampling")
    inputs = {
        "positive": positive, "negative": negative, "latent": {"samples": latent.new_zeros(shape)}, "cfg": 3.0,
        "noise": Noise_RandomNoise(7), "sampler": comfy.samplers.sampler_object("euler"), "block": 8,
        "sigmas": comfy.samplers.calculate_sigmas(sampling, "simple", steps), **inputs,
    }  # fmt: skip
    return run_node(AttentionProbe, model=model, **inputs)


@pytest.mark.parametrize("name", SERVED)
def test_every_architecture(name):
    model, spec = model_of(name)
    out = probe(model, spec, steps=2)
    picture, report, density, amount = out
    assert out.ui == {"tessera_report": [report]}
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["kind"] == "probe" and report["steps"] == [0, 1] and report["notes"] == []
    assert report["tokens"] == torch.tensor(report["grid"]).prod() > report["queries"] // 3
    assert all(len(b["by_step"]) == 2 and all(0 < r <= 1 for r in b["by_step"]) for b in report["blocks"])
    assert report["ladder"][-1]["recall"] == 1 and report["suggested"]["recall"] >= 0.9
    assert (density, amount) == (report["suggested"]["density"], report["suggested"]["amount"])
    assert amount == math.ceil(density * math.ceil(report["tokens"] / 8))
    assert picture.shape[0] == 1 and picture.shape[3] == 3
    assert len(report["lines"]) >= 2


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_suggestion_holds_when_it_is_measured_again(pattern):
    model, spec = model_of("wan_meta")
    first = probe(model, spec, pattern=pattern, recall=0.8, density=0.02)[1]
    again = probe(model, spec, pattern=pattern, recall=0.8, density=first["suggested"]["density"])[1]
    assert again["chosen"] == first["suggested"] and again["chosen"]["recall"] >= 0.8
    for block in first["blocks"]:
        own = probe(model, spec, pattern=pattern, density=block["suggested"]["density"], blocks=str(block["block"]))[1]
        assert [b["block"] for b in own["blocks"]] == [block["block"]]
        assert own["blocks"][0]["recall"] == pytest.approx(block["suggested"]["recall"], abs=2e-6)
        assert block["suggested"]["recall"] >= 0.8


def test_density_one_keeps_all_and_more_keeps_more():
    model, spec = model_of("flux")
    assert probe(model, spec, density=1.0)[1]["chosen"]["recall"] == 1
    told = probe(model, spec)[1]
    recalls = [entry["recall"] for entry in told["ladder"]]
    assert recalls == sorted(recalls) and recalls[0] < 1
    assert [entry["density"] >= d for entry, d in zip(told["ladder"], m.LADDER, strict=True)] == [True] * 7


def test_same_seed_same_report_and_the_model_keeps_nothing():
    model, spec = model_of("flux")
    job = Job(spec, steps=2)
    options = dict(model.model_options["transformer_options"])
    plain = job(model)
    a, b, c = (probe(model, spec, queries=20, seed=seed) for seed in (3, 3, 4))
    assert a[1] == b[1] and torch.equal(a[0], b[0]) and a[1]["chosen"] != c[1]["chosen"]
    assert model.model_options["transformer_options"] == options and not model.wrappers
    assert torch.equal(job(model), plain)
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is Run]


def test_cancel_propagates_and_leaves_nothing():
    model, spec = model_of("flux")
    plain = Job(spec, steps=2)(model)

    class Interrupting(Noise_RandomNoise):
        def generate_noise(self, latent):
            comfy.model_management.interrupt_current_processing(True)
            return super().generate_noise(latent)

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        probe(model, spec, noise=Interrupting(7))
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is Run]
    assert torch.equal(Job(spec, steps=2)(model), plain)


def test_steps_and_blocks():
    model, spec = model_of("flux")
    told = probe(model, spec, steps=7, blocks="1,3", **{"queries": 16})[1]
    assert told["steps"] == [0, 2, 4, 6] and [b["block"] for b in told["blocks"]] == [1, 3]
    assert m.spread(25, 4) == [0, 8, 16, 24] and m.spread(2, 9) == [0, 1] and m.spread(5, 1) == [0]
    assert m.ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8" and m.ranges([]) == ""


def test_a_window_that_looks_at_its_own_frame_only_says_what_it_can_reach():
    model, spec = model_of("wan_meta")
    out = probe(model, spec, pattern="window", frames=0, recall=0.99)
    report = out[1]
    assert report["suggested"] is None and any(line.startswith("no setting keeps 0.99") for line in report["lines"])
    assert out[2] == report["ladder"][-1]["density"] < 1
    assert all(b["suggested"] is None for b in report["blocks"])


def test_what_else_acts_is_told():
    model, spec = model_of("flux")
    window = run_node(LocalWindowAttention, model=model, radius=2, min_tokens=0)[0]
    assert "Local Window Attention acted on this MODEL" in probe(window, spec)[1]["notes"][0]
    told = probe(taylor(model, interval=3, warmup=1, tail_full=0), spec, steps=6)[1]
    assert any(None in b["by_step"] for b in told["blocks"]) or len(told["notes"]) == 1


def test_what_cannot_be_measured_is_an_error():
    model, spec = model_of("hunyuan3d2")
    with pytest.raises(ValueError, match="Attention Probe cannot act here: the tokens"):
        run_node(AttentionProbe, model=model, sigmas=torch.tensor([1.0, 0.0]), **dict.fromkeys(JOB))
    model, spec = model_of("flux")
    with pytest.raises(ValueError, match="at least 2 sigmas"):
        probe(model, spec, sigmas=torch.tensor([1.0]))
    with pytest.raises(ValueError, match="there is no block 40"):
        probe(model, spec, blocks="40")
