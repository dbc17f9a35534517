"""Accelerate where something on the MODEL, in the sampler or in a file of an earlier run is not as it was."""

import json
import logging
from dataclasses import replace

import comfy.sample
import comfy.samplers
import pytest
import torch
from accelerate_helper import clock, told  # noqa: F401
from comfy_extras.nodes_easycache import EasyCacheNode
from nodes_helper import Job, error, model_of, run_node, taylor
from tiny_models import conds, empty_latent

from tessera.methods.measure.stack_files import file_name
from tessera.nodes.cache.dynamic_tokens import DynamicTokens
from tessera.nodes.measure.accelerate import Accelerate, own_folder
from tessera.patching.quant_layer import Asked
from tessera.patching.quantize import quantize
from tessera.patching.report import latest_record


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("folder_paths.get_output_directory", lambda: str(tmp_path))
    return tmp_path


def accelerated(model, **inputs):
    return run_node(Accelerate, model=model, **{"min_ssim": 0.2, **inputs})[0]


def names(model) -> list[str]:
    return [feature["name"] for feature in latest_record(model)["features"]]


def rewritten(**change) -> str:
    """The name of the one profile that there is, after the change."""
    (path,) = own_folder().glob("*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return path.name


def test_a_cache_acts_on_packed_weights(tmp_path):
    plain, spec = model_of("flux")
    packed = quantize(plain, Asked("int8_row"), None, tmp_path / "q.safetensors", "", "replace")[0]
    job = Job(spec, steps=14)
    model = accelerated(plain, packed_model=packed)
    got, facts = job(model), told(model)
    tried = {p["name"]: p for p in facts["front"]}
    both = next(p for name, p in tried.items() if "packed weights" in name)
    alone = tried[both["name"].removesuffix(" + packed weights")]
    assert both["blocks_skipped"] == alone["blocks_skipped"] > 0 and both["ratio"] == alone["ratio"]
    cache = facts["stack"]["cache"]
    name = rewritten(stack={"cache": cache, "weights": {"method": "packed", "name": "packed weights"}})
    applied = accelerated(plain, packed_model=packed, profile=name)
    settings = {k: cache[k] for k in ("interval", "order", "warmup", "tail_full", "level")}
    assert torch.equal(job(applied), job(taylor(packed, **settings)))
    assert 0 < error(job(applied), got) < 0.1 and names(applied) == ["Accelerate", "Taylor Cache"]
    with pytest.raises(ValueError, match="Connect packed_model"):
        job(accelerated(plain, profile=name))
    later = accelerated(plain)
    job(later)
    assert told(later)["trials"] > 0  # what was found with packed weights is not used without


@pytest.mark.parametrize("put", [taylor, lambda m: EasyCacheNode.execute(m, 0.2, 0.15, 0.95, False).args[0]])
def test_a_cache_that_comes_and_goes(put):
    plain, spec = model_of("flux")
    job = Job(spec, steps=14)
    model, cached = accelerated(plain), accelerated(put(plain))
    want = job(put(plain))
    for _ in range(2):
        job(model)
        assert told(model)["stack"]
        assert torch.equal(job(cached), want)
        assert not told(cached)["stack"] and "Remove one of them" in told(cached)["note"]


def test_branches_with_other_goals_do_not_take_each_others_file():
    plain, spec = model_of("flux")
    job = Job(spec, steps=14)
    branches = [accelerated(plain), accelerated(plain, min_ssim=0.1), accelerated(plain, goal="a wanted speed-up")]
    for again in (False, True):
        for model in branches:
            job(model)
            assert (told(model)["trials"] == 0) == again
    pictured = accelerated(plain, decode="digits")
    job(pictured)
    assert told(pictured)["trials"] > 0  # what was judged on the latent says nothing of pictures


def sample_strange_noise(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Draws from torch's own generator, as samplers with churn do."""
    for n in range(len(sigmas) - 1):
        denoised = model(x, sigmas[n] * x.new_ones([len(x)]), **extra_args)
        callback({"x": x, "i": n, "sigma": sigmas[n], "sigma_hat": sigmas[n], "denoised": denoised})
        x = denoised + torch.randn_like(x) * sigmas[n + 1]
    return x


def test_trials_leave_the_samplers_noise_as_it_was():
    plain, spec = model_of("flux")
    sample_strange_noise.__name__ = "<a, strange> sampler"
    sampler, (positive, negative) = comfy.samplers.KSAMPLER(sample_strange_noise), conds(spec)

    def run(model):
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 14)
        noise = comfy.sample.prepare_noise(empty_latent(spec), 7)
        return guider.sample(noise, empty_latent(spec), sampler, sigmas, seed=7, disable_pbar=True)

    with torch.inference_mode():
        model = accelerated(plain, min_ssim=1.0)
        assert torch.equal(run(model), run(plain)) and told(model)["trials"] > 1


def test_what_features_warn_of_is_logged_once(caplog):
    plain, spec = model_of("flux")
    with caplog.at_level(logging.WARNING, "tessera"):
        Job(spec, steps=14, sampler="euler_ancestral")(accelerated(plain))
    assert len([r for r in caplog.records if "adds new noise" in r.message]) == 1


def test_names_of_models_that_are_no_file_names():
    plain, spec = model_of("wan_ar")
    Job(spec, steps=8)(accelerated(plain))
    (path,) = own_folder().glob("*.json")
    assert path.stem.startswith("Wan-autoregressive_euler_8_ssim0.2_")
    assert file_name("../", "<x>", "", 3) == "x_3" and len(file_name("a" * 300)) == 100


CACHE = {"name": "c", "method": "taylor", "interval": 3, "order": 1, "warmup": 3, "tail_full": 1, "level": "last_block"}
POINT = {"name": "p", "ratio": 1.0, "loss": 0.0, "chosen": True}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"goal": {"ssim": float("nan")}}, "JSON"),
        ({"points": [{**POINT, "seconds": float("inf")}]}, "JSON"),
        ({"points": [{**POINT, "ratio": 10**400}]}, "no profile of Accelerate"),
        ({"points": [{**POINT, "ratio": -1}]}, "a point without ratio"),
        ({"points": [{**POINT, "loss": True}]}, "a point without loss"),
        ({"points": []}, "not one chosen point"),
        ({"size": 5}, "wrong type"),
        ({"goal": [1]}, "wrong type"),
        ({"declined": [1]}, "wrong type"),
        ({"stack": {"cache": {**CACHE, "name": "n" * 300}}}, "without a name"),
        ({"stack": {"cache": {**CACHE, "level": ["output"]}}}, "cache level"),
        ({"stack": {"attention": CACHE}}, "taylor as its attention"),
        ({"stack": {"attention": {"name": "s", "method": "sparse_linear", "topk": True}}}, "topk True"),
        ({"stack": {"weights": CACHE}}, "Connect packed_model"),
    ],
)
def test_hostile_profiles(change, sentence):
    plain, spec = model_of("flux")
    job = Job(spec, steps=8)
    job(accelerated(plain, trials=4))
    name = rewritten(**change)
    with pytest.raises(ValueError, match=sentence):
        job(accelerated(plain, profile=name))
    job(accelerated(plain, name=name, trials=4))  # a damaged one of its own is made anew


def test_a_job_at_which_nothing_can_be_tried_says_so():
    model, spec = model_of("flux")
    model = accelerated(model)
    for how in ("(1 trial run)", "(profile "):
        Job(spec, steps=4)(model)
        (line,) = [f["line"] for f in latest_record(model)["features"] if f["name"] == "Accelerate"]
        assert "plain: nothing can be tried here; caches are from 6 steps on" in line and how in line


def test_numbers_of_another_size_or_company_say_so():
    plain, spec = model_of("flux")
    job = Job(spec, steps=14)
    job(accelerated(plain))
    model = accelerated(plain)
    job(model)
    assert told(model)["trials"] == 0 and not told(model)["note"]
    model = run_node(DynamicTokens, model=accelerated(plain), quantile=0.5)[0]
    job(model)
    assert told(model)["note"] == "measured beside nothing else and not Dynamic Tokens"
    wide = replace(spec, latent=(*spec.latent[:-1], 2 * spec.latent[-1]))
    model = accelerated(plain)
    Job(wide, steps=14)(model)
    assert told(model)["note"] == f"measured on a latent {[*spec.latent]} and not {[*wide.latent]}"
