"""Step Cache as a node, on stock models: every policy is off at threshold 0, skips what it says, and leaves nothing."""

import gc
import weakref

import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from nodes_helper import Job, error, model_of, taylor, watching
from step_helper import ON, STEPS, job_of, kinds, plain, step, told

from tessera.methods.cache.gate import Gate
from tessera.methods.cache.taylor import Forecast
from tessera.patching.cache_attention import Broadcasts
from tessera.patching.cache_state import CacheState
from tessera.patching.forward import Forward
from tessera.patching.report import latest_record

COUNTED = ("MagCache", "FORA", "PAB")
POLICY = pytest.mark.parametrize("policy", ON)
CASES = [
    ("flux", "fp32"), ("flux", "bf16"), ("wan_meta", "fp32"), ("sd3", "bf16"), ("ltxv_meta", "fp32"), ("lumina2", "bf16"),
]  # fmt: skip
EVERY = pytest.mark.parametrize("policy, name, dtype", [(p, n, d) for p in ON for n, d in CASES], ids=lambda v: v)


@EVERY
def test_threshold_0_is_off_bit_for_bit_with_the_hooks_firing(policy, name, dtype):
    model, spec = model_of(name, dtype)
    want, each = plain(name, dtype)
    patched = step(model, policy, threshold=0.0)
    with watching(model) as watch:
        got = job_of(spec)(patched)
    assert torch.equal(got, want) and torch.isfinite(got).all() and watch.each == each
    assert told(patched)["full"] == len(told(patched)["decisions"]) == STEPS and told(patched)["peak_bytes"] == 0


@EVERY
def test_skips_what_it_says_also_after_an_interrupt(policy, name, dtype):
    model, spec = model_of(name, dtype)
    want, each = plain(name, dtype)
    patched = step(model, policy)
    with watching(model) as watch:
        got = job_of(spec)(patched)
    first = told(patched)
    assert torch.isfinite(got).all() and 1e-5 < error(got, want) < 1.0
    assert kinds(patched)[:2] == "ff" and kinds(patched)[-1] == "f" and "s" in kinds(patched)
    assert first["policy"] == policy and first["peak_bytes"] > 0 and latest_record(patched)["features"][0]["line"]
    if policy == "PAB":
        assert watch.each == each and first["attention_reused"] > 0  # blocks run as ever
    else:
        assert first["blocks_computed"] == watch.blocks < sum(each) == watch.blocks + first["blocks_skipped"]

    def stop(number):
        if number == 3:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        job_of(spec, on_step=stop)(patched)
    assert torch.equal(job_of(spec)(patched), got) and told(patched)["decisions"] == first["decisions"]


@POLICY
def test_separate_cfg_decides_as_joined_cfg(policy, monkeypatch):
    model, spec = model_of("flux")
    patched = step(model, policy)
    joined = job_of(spec)(patched)
    decisions, forwards = told(patched)["decisions"], latest_record(patched)["forwards"]
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 0)
    separate = job_of(spec)(patched)
    assert latest_record(patched)["forwards"] == 2 * forwards
    assert [d["kind"] for d in told(patched)["decisions"]] == [d["kind"] for d in decisions]
    assert error(separate, joined) < 1e-4


@pytest.mark.parametrize("policy", COUNTED)
def test_a_batch_is_its_pictures_where_evaluations_are_counted(policy):
    model, spec = model_of("wan_meta")
    patched = step(model, policy)
    noises = [torch.randn(spec.latent, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    single = [job_of(spec, noise=noise)(patched) for noise in noises]
    both = job_of(spec, noise=torch.cat(noises), batch=2)(patched)
    assert error(both, torch.cat(single)) < 1e-4 and "s" in kinds(patched)


def alive(*types):
    gc.collect()
    return [o for o in gc.get_objects() if isinstance(o, types)]


@POLICY
def test_no_tensor_outlives_the_run(policy):
    model, spec = model_of("flux")
    patched, held = step(model, policy, fill="foca"), []

    def look(number):
        if number == 3:
            stores = alive(Forecast)
            held.extend(weakref.ref(t) for f in stores for t in f._features)
            gates = [v for g in alive(Gate) for v in vars(g).values()]
            held.extend(weakref.ref(v) for v in gates if isinstance(v, torch.Tensor))

    job_of(spec, on_step=look)(patched)
    assert len(held) >= 3
    assert not alive(Forecast, Gate, CacheState, Broadcasts, Forward)
    assert not [ref for ref in held if ref() is not None]


@pytest.mark.parametrize("policy", ["DBCache", "EasyCache", "PAB"])
def test_two_samplers_share_one_model(policy):
    model, spec = model_of("flux")
    latent = torch.zeros(*spec.latent[:-2], 4, 4)
    big, small = job_of(spec), Job(spec, steps=4, latent=latent, sampler="heun", seed=1)
    shared = step(model, policy)
    a, b = big(shared), small(shared)
    assert torch.equal(big(shared), a) and torch.equal(small(step(model, policy)), b)


@POLICY
@pytest.mark.parametrize("sampler, denoise", [("heun", 1.0), ("dpm_2", 1.0), ("euler", 0.4)])
def test_samplers_and_partial_denoise(policy, sampler, denoise):
    model, spec = model_of("flux")
    patched = step(model, policy)
    latent = torch.randn(spec.latent, generator=torch.Generator().manual_seed(3))
    got = job_of(spec, sampler=sampler, denoise=denoise, latent=latent)(patched)
    assert torch.isfinite(got).all() and "s" in kinds(patched)
    assert all(d["sigma"] < 0.75 for d in told(patched)["decisions"]) or denoise == 1.0


@pytest.mark.parametrize("name", ["flux", "sd3", "lumina2"])
@pytest.mark.parametrize("level", ["auto", "output"])
def test_fora_is_taylor_cache_of_order_0_bit_for_bit(name, level):
    model, spec = model_of(name)
    fora = step(model, "FORA", level=level)
    want = job_of(spec)(taylor(model, order=0, level="output" if level == "output" else "last_block"))
    assert torch.equal(job_of(spec)(fora), want) and kinds(fora) == "ffssff"


@pytest.mark.parametrize("fill, same", [("taylor1", {"order": 1}), ("taylor2", {"order": 2}), ("reuse", {"order": 0})])
def test_fills_are_taylor_caches(fill, same):
    model, spec = model_of("flux")
    got = job_of(spec)(step(model, "FORA", fill=fill))
    assert torch.equal(got, job_of(spec)(taylor(model, **same)))


@POLICY
@pytest.mark.parametrize("most, skipped", [(0, "fffffff"), (1, "fsfsfsf"), (2, "fssfssf")])
def test_max_consecutive(policy, most, skipped):
    model, spec = model_of("flux")
    settings = {**ON[policy], "threshold": 100.0, "interval": 9, "cross_interval": 9, "retention": 0.0}
    patched = step(model, policy, **settings, max_consecutive=most, warmup=1, tail_full=0)
    job_of(spec, steps=7)(patched)
    rate = policy == "EasyCache" and most > 0  # known after two computed evaluations
    assert kinds(patched) == (f"f{skipped}"[:7] if rate else skipped)


@pytest.mark.parametrize("policy, fill", [(p, "auto") for p in ON] + [("FORA", "foca"), ("FBCache", "taylor2")])
def test_held_bytes_are_reserved(policy, fill, monkeypatch):
    asked, load = [], comfy.model_management.load_models_gpu

    def load_models_gpu(models, memory_required=0, **rest):
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **rest)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load_models_gpu)
    model, spec = model_of("flux")
    patched = step(model, policy, fill=fill)
    for one, steps in ((model, 1), (patched, STEPS), (step(model, policy, threshold=0.0), 1)):
        Job(spec, steps=steps)(one)
    held = told(patched)["peak_bytes"]
    assert held <= asked[1] - asked[0] <= 2 * held and asked[2] == asked[0]
