"""The node on tiny models: off is bit-equal, a refresh is dense, and state is born and dies with its run, whatever
stands beside it."""

import pytest
import torch
from nodes_helper import Job, comfy, error, facts, kinds, model_of, run_node, taylor

from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.nodes.attention.rettention import Rettention

NAME = "Rettention"
SERVED = ("flux", "wan_meta", "sd3", "ltxv_meta", "qwen_image", "lumina2", "cosmos_predict2", "hunyuan_video")


def rettention(model, **inputs):
    given = {"min_tokens": 0, "density": 0.3, "pattern": "band_per_frame", "interval": 3, "dense_first_steps": 0}
    return run_node(Rettention, model=model, **{**given, **inputs})[0]


@pytest.mark.parametrize(
    "off, why", [({"interval": 1}, "interval 1 is dense"), ({"density": 1.0}, "spans the picture")]
)
@pytest.mark.parametrize("name", SERVED)
def test_off_changes_nothing(name, off, why):
    model, spec = model_of(name)
    job, patched = Job(spec, steps=2), rettention(model, **off)
    assert torch.equal(job(patched), job(model))
    told = facts(patched, NAME)
    assert all(why in reason for reason in told["declined"]) and told["calls"] == sum(told["declined"].values()) > 0
    assert told["peak_bytes"] == 0


@pytest.mark.parametrize("name", SERVED)
def test_refreshes_and_reuses(name):
    """The first evaluation of a run is dense; of the next ones the picture shows that they were not."""
    model, spec = model_of(name)
    patched, one, job = rettention(model), Job(spec, steps=1), Job(spec, steps=4)
    assert error(one(patched), one(model)) < 1e-5
    assert facts(patched, NAME)["reused"] == 0
    got = job(patched)
    told = facts(patched, NAME)
    assert told["calls"] == told["served"] == told["refreshed"] + told["reused"]
    assert told["refreshed"] == told["reused"] > 0, "steps 0 and 3 of 4"
    assert 1e-6 < error(got, job(model)) < 0.5
    assert torch.equal(job(patched), got)


def test_reuses_are_timed_against_dense_attention_not_refreshes():
    model, spec = model_of("flux")
    patched = rettention(model)
    Job(spec, steps=1)(patched)
    assert facts(patched, NAME)["served"] == 4 and "call_ms" not in facts(patched, NAME)
    Job(spec, steps=2)(patched)
    assert facts(patched, NAME)["call_ms"] > 0 and facts(patched, NAME)["dense_call_ms"] > 0


@pytest.mark.parametrize(("sampler", "refreshed"), [("euler", 8), ("dpm_2", 8)])
def test_full_steps_are_counted_as_in_the_paper(sampler, refreshed):
    """20 steps, 5 dense, one in 5 after them: 5, 10 and 15 are full too. dpm_2 refreshes once a step."""
    model, spec = model_of("flux")
    patched = rettention(model, interval=5, dense_first_steps=5)
    Job(spec, steps=20, cfg=1.0, sampler=sampler)(patched)
    told = facts(patched, NAME)
    evaluations = told["calls"] // 4
    assert told["refreshed"] == 4 * (refreshed - 5) and told["calls"] == 4 * evaluations
    assert told["declined"]["outside the chosen steps"] == 4 * (5 if sampler == "euler" else 10)


@pytest.mark.parametrize(("sampler", "evaluations", "refreshed"), [("heun", 7, 2), ("heunpp2", 9, 5)])
def test_samplers_that_look_ahead(sampler, evaluations, refreshed):
    """Steps 0 and 2 are full: of heun their first evaluation, of heunpp2, which goes back, each evaluation by itself."""
    model, spec = model_of("flux")
    patched = rettention(model, interval=2)
    assert torch.isfinite(Job(spec, steps=4, cfg=1.0, sampler=sampler)(patched)).all()
    told = facts(patched, NAME)
    assert (told["calls"], told["refreshed"]) == (4 * evaluations, 4 * refreshed)


def test_a_run_starts_clean():
    model, spec = model_of("wan_meta")
    patched, job = rettention(model), Job(spec, steps=3)
    want = job(patched)
    assert torch.equal(job(patched), want)
    other = Job(spec, steps=3, latent=torch.zeros(1, 16, 3, 6, 10), seed=3)
    assert torch.isfinite(other(patched)).all() and torch.equal(job(patched), want)

    def stop(step):
        raise comfy.model_management.InterruptProcessingException()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        Job(spec, steps=3, on_step=stop)(patched)
    assert torch.equal(job(patched), want)


def test_bf16_and_odd_sizes():
    model, spec = model_of("flux", "bf16")
    job = Job(spec, steps=3, latent=torch.zeros(1, 16, 7, 11))
    got = job(rettention(model))
    assert torch.isfinite(got).all() and error(got, job(model)) < 0.5
    assert error(job(rettention(model, cache_dtype="float32", cache_device="cpu")), got) < 0.05


def test_separate_and_joined_prompts_agree(monkeypatch):
    model, spec = model_of("flux")
    patched, job = rettention(model), Job(spec, steps=4)
    joined = job(patched)
    calls = facts(patched, NAME)["calls"]
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda *_: 0)
    assert error(job(patched), joined) < 1e-4
    assert facts(patched, NAME)["calls"] == 2 * calls


def lora(model):
    patched, key = model.clone(), "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    weight = model.model_state_dict()[key]
    patched.add_patches({key: ("diff", (torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)) * 0.2,))})
    return patched


def test_beside_everything_else():
    model, spec = model_of("flux")
    job = Job(spec, steps=8)
    one, two = rettention(taylor(model)), taylor(rettention(model))
    assert torch.equal(job(one), job(two)) and kinds(one) == "ffppfppf"
    assert facts(one, NAME)["calls"] == 4 * 4 and facts(one, NAME)["refreshed"] == 4 * 3, "steps 0, 4 and 7 of 0 1 4 7"
    assert torch.equal(job(rettention(lora(model))), job(lora(rettention(model))))
    assert torch.equal(job(lora(rettention(model, interval=1))), job(lora(model)))
    theirs, seen = model.clone(), []
    theirs.model_options["transformer_options"]["optimized_attention_override"] = lambda func, *args, **kwargs: (
        seen.append(1) or func(*args, **kwargs)
    )
    over = rettention(theirs, blocks="0-1")
    job(over)
    assert facts(over, NAME)["served"] == len(seen) == 16
    window = run_node(LocalWindowAttention, model=model, radius=2, min_tokens=0, blocks="2-3")[0]
    both = rettention(window, blocks="0-1")
    job(both)
    assert facts(both, NAME)["served"] == facts(both, "Local Window Attention")["served"] == 16


@pytest.mark.parametrize("settings", [{}, {"cache_dtype": "bfloat16"}, {"blocks": "1", "residual": False},
                                      {"min_tokens": 4096}, {"interval": 1}])  # fmt: skip
@pytest.mark.parametrize("name", ["flux", "wan_meta"])
def test_what_it_holds_is_reserved(name, settings, monkeypatch):
    asked, load = [], comfy.model_management.load_models_gpu

    def load_models_gpu(models, memory_required=0, **rest):
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **rest)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load_models_gpu)
    model, spec = model_of(name)
    patched, job = rettention(model, **settings), Job(spec, steps=3)
    job(model), job(patched)
    held = facts(patched, NAME)["peak_bytes"]
    assert held <= asked[1] - asked[0] <= 2 * held
    assert (held > 0) == (not settings.keys() & {"min_tokens", "interval"})
