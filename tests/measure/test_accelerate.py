"""Accelerate: trials in the sampler's own run, what is kept, and what is left behind."""

import gc
import json

import comfy.model_management
import comfy.samplers
import pytest
import torch
from accelerate_helper import clock, told  # noqa: F401
from nodes_helper import Job, model_of, run_node, taylor
from tiny_models import tiny

from tessera.methods.measure.stack_files import StackProfile
from tessera.nodes.measure.accelerate import Accelerate, own_folder
from tessera.patching import trials
from tessera.patching.report import latest_record
from tessera.patching.run import Run
from tessera.patching.stacks import feature_of, ladders, served


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("folder_paths.get_output_directory", lambda: str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["flux", "wan_meta", "sd3", "lumina2", "ltxav_meta"])
def test_the_first_run_measures_and_later_ones_apply(name, folder):
    plain, spec = model_of(name)
    job = Job(spec, steps=14)
    want = job(plain)
    model = run_node(Accelerate, model=plain, min_ssim=0.2)[0]
    first, facts = job(model), told(model)
    files = list(own_folder().glob("*.json"))
    assert len(files) == 1 and facts["profile"] == files[0].stem and facts["trials"] <= 12
    assert facts["front"][0]["name"] == "plain" and facts["stack"] and facts["speedup"] > 1
    chosen = facts["stack"]["cache"]
    same = taylor(plain, **{k: chosen[k] for k in ("interval", "order", "warmup", "tail_full", "level")})
    assert torch.equal(
        torch.cat([p.flatten() for p in parts(first)]), torch.cat([p.flatten() for p in parts(job(same))])
    )
    again = run_node(Accelerate, model=plain, min_ssim=0.2)[0]
    assert torch.equal(parts(job(again))[0], parts(first)[0]) and told(again)["trials"] == 0
    assert torch.equal(parts(job(plain))[0], parts(want)[0])
    other = run_node(Accelerate, model=plain, min_ssim=0.2)[0]
    Job(spec, steps=10)(other)
    assert told(other)["trials"] > 0 and len(list(own_folder().glob("*.json"))) == 2


def parts(latent):
    return latent.unbind() if latent.is_nested else [latent]


def test_a_loss_that_nothing_keeps_gives_the_plain_run():
    plain, spec = model_of("flux")
    model = run_node(Accelerate, model=plain, min_ssim=1.0)[0]
    job = Job(spec, steps=14)
    assert torch.equal(job(model), job(plain))
    assert told(model)["stack"] == {} and "plain" in latest_record(model)["features"][0]["line"]


def test_a_wanted_speed():
    plain, spec = model_of("wan_meta")
    model = run_node(Accelerate, model=plain, goal="a wanted speed-up", speedup=1.5)[0]
    Job(spec, steps=14)(model)
    facts = told(model)
    assert facts["speedup"] >= 1.5 and facts["goal"] == {"speedup": 1.5}
    enough = [p for p in facts["front"] if p["ratio"] >= 1.5 and not p.get("abandoned")]
    assert min(enough, key=lambda p: p["loss"])["chosen"]


def test_a_shared_profile_is_applied_without_a_trial(folder):
    plain, spec = model_of("flux")
    job = Job(spec, steps=14)
    made = run_node(Accelerate, model=plain, min_ssim=0.2, name="mine")[0]
    want = job(made)
    fresh = model_of("flux")[0]
    model = run_node(Accelerate, model=fresh, profile="mine.json", trials=0)[0]
    assert torch.equal(job(model), want) and told(model)["trials"] == 0
    shorter = Job(spec, steps=10)
    shorter(model)
    assert "number of steps 14 and not 10" in latest_record(model)["features"][0]["line"]
    other, elsewhere = model_of("wan_meta")
    with pytest.raises(ValueError, match="made for another model"):
        Job(elsewhere, steps=14)(run_node(Accelerate, model=other, profile="mine.json")[0])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "x"}, "no profile of Accelerate"),
        ({"stack": {"cache": {"name": "x", "method": "unknown"}}}, "does not know"),
        (
            {"stack": {"cache": {"name": "x", "method": "taylor", "interval": 900}}},
            "interval 900; it goes from 1 to 20",
        ),
        ({"stack": {"other": {"name": "x"}}}, "a stack has cache"),
        ({"points": [{"name": "p", "ratio": "fast", "loss": 0}]}, "a point without ratio"),
        ({"more": 1}, "no profile of Accelerate"),
    ],
)
def test_damaged_profiles(change, sentence, folder):
    plain, spec = model_of("flux")
    model = run_node(Accelerate, model=plain, min_ssim=0.2, name="mine")[0]
    Job(spec, steps=14)(model)
    path = own_folder() / "mine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=sentence):
        Job(spec, steps=14)(run_node(Accelerate, model=plain, profile="mine.json")[0])


def test_what_stands_on_the_model_stays():
    plain, spec = model_of("wan_meta")
    job = Job(spec, steps=14)
    cached = taylor(plain, interval=2)
    model = run_node(Accelerate, model=cached, min_ssim=0.5)[0]
    assert torch.equal(job(model), job(cached))  # nothing else can act on so few tokens
    assert "found a Taylor Cache on this MODEL already" in told(model)["note"]
    with pytest.raises(ValueError, match="Accelerate is on this MODEL already"):
        run_node(Accelerate, model=model)
    with pytest.raises(ValueError, match="too few"):
        job(run_node(Accelerate, model=plain, trials=2)[0])


@pytest.mark.parametrize("at", [1, 20, 40])
def test_cancel_in_the_middle_of_trials(at, monkeypatch, folder):
    plain, spec = model_of("flux")
    job = Job(spec, steps=14)
    want = job(plain)
    seen = []
    original = comfy.model_management.throw_exception_if_processing_interrupted

    def check():
        seen.append(1)
        if len(seen) == at:
            comfy.model_management.interrupt_current_processing(True)
        original()

    monkeypatch.setattr(trials.comfy.model_management, "throw_exception_if_processing_interrupted", check)
    model = run_node(Accelerate, model=plain, min_ssim=0.2)[0]
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        job(model)
    assert len(seen) >= at and not list(folder.rglob("*.json"))
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is Run]
    assert torch.equal(job(plain), want)
    assert told_after(job, model)["stack"]


def told_after(job, model):
    job(model)
    return told(model)


def test_the_sampler_hears_one_run_only():
    plain, spec = model_of("flux")
    steps = []
    model = run_node(Accelerate, model=plain, min_ssim=0.2)[0]
    Job(spec, steps=14, on_step=steps.append)(model)
    assert steps == list(range(14))
    assert len(latest_record(model)["features"]) == 2


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "uni_pc", "euler_ancestral", "heun"])
def test_other_samplers_and_prompts_are_not_spoilt(sampler):
    plain, spec = model_of("wan_meta")
    job = Job(spec, steps=14, sampler=sampler, batch=2)
    model = run_node(Accelerate, model=plain, min_ssim=1.0)[0]
    assert torch.equal(job(model), job(plain))


def test_packed_weights_are_tried_and_used():
    plain, spec = model_of("flux")
    packed = model_of("flux")[0]
    packed.set_model_unet_function_wrapper(
        lambda apply, args: apply(args["input"], args["timestep"], **args["c"]) * 1.0001
    )
    model = run_node(Accelerate, model=plain, min_ssim=0.2, packed_model=packed)[0]
    Job(spec, steps=14)(model)
    names = [p["name"] for p in told(model)["front"]]
    assert any("packed weights" in name for name in names)


def test_ladders_fit_the_run():
    assert ladders((1, 64, 64), 4, True, False).keys() == {"attention"}
    assert ladders((1, 8, 8), 4, True, False) == {}
    found = ladders((21, 30, 52), 30, True, True)
    assert found.keys() == {"cache", "attention", "weights"}
    assert all(
        feature_of(s, None) is not None for s in found["cache"][0] + found["attention"][0] + found["attention"][1]
    )
    assert {s["level"] for several in ladders(None, 20, False, False)["cache"] for s in several} == {"output"}


def test_declined_methods_say_why():
    model, _ = tiny("pixart")
    several = ladders((1, 64, 64), 20, True, False)["attention"]
    kept, why = served(several, (), model)
    assert len(kept) + len(why) == 2


def test_profiles_are_plain_json(folder):
    plain, spec = model_of("flux")
    model = run_node(Accelerate, model=plain, min_ssim=0.2, name="mine")[0]
    Job(spec, steps=14)(model)
    text = (own_folder() / "mine.json").read_text()
    profile = StackProfile.from_json(text, "mine")
    assert StackProfile.from_json(profile.to_json(), "mine") == profile and profile.steps == 14
