"""Step Cache as a node, on stock models: every policy is off at threshold 0, skips what it says, and leaves nothing."""

import functools
import gc
import weakref
from types import SimpleNamespace

import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from comfy.controlnet import ControlBase
from nodes_helper import Job, error, facts, model_of, run_node, taylor, watching
from tiny_models import conds

from tessera.methods.cache.gate import Gate
from tessera.methods.cache.profile import Profile
from tessera.methods.cache.schedule import Schedule
from tessera.methods.cache.taylor import Forecast
from tessera.nodes.cache.step_cache import StepCache
from tessera.patching.cache_attention import Broadcasts
from tessera.patching.cache_state import CacheState
from tessera.patching.forward import Forward
from tessera.patching.report import latest_record

STEPS = 6
CALIBRATION = SimpleNamespace(mag_ratios=(1.0, 0.95, 0.97, 0.98, 0.99, 1.02), sigmas=(), tea_coefficients=(), model="")
ON = {  # settings that skip within 6 steps on models whose weights are random
    "FBCache": {"threshold": 1.5},
    "EasyCache": {"threshold": 2.0},
    "TeaCache": {"threshold": 2.0, "coefficients": "1, 0"},
    "MagCache": {"threshold": 0.3, "calibration": CALIBRATION},
    "DBCache": {"threshold": 1.5},
    "FORA": {"interval": 3},
    "PAB": {"interval": 3, "cross_interval": 2},
}
COUNTED = ("MagCache", "FORA", "PAB")
POLICY = pytest.mark.parametrize("policy", ON)
CASES = [
    ("flux", "fp32"), ("flux", "bf16"), ("wan_meta", "fp32"), ("sd3", "bf16"), ("ltxv_meta", "fp32"), ("lumina2", "bf16"),
]  # fmt: skip
EVERY = pytest.mark.parametrize(
    "policy, name, dtype", [(p, n, d) for p in ON for n, d in CASES if (p, n) != ("TeaCache", "sd3")], ids=lambda v: v
)


def step(model, policy, **inputs):
    return run_node(StepCache, model=model, policy=policy, **{"warmup": 2, **ON[policy], **inputs})[0]


def told(model) -> dict:
    return facts(model, "Step Cache")


def kinds(model) -> str:
    """One letter an evaluation: f computed, s skipped."""
    return "".join("f" if d["kind"] == "full" else "s" for d in told(model)["decisions"])


def job_of(spec, **more):
    return Job(spec, **{"steps": STEPS, **more})


@functools.cache
def plain(name, dtype):
    """(picture, how often each block ran) without any node."""
    model, spec = model_of(name, dtype)
    with watching(model) as watch:
        picture = job_of(spec)(model)
    return picture, watch.each


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


def constant(model, blocks):
    """A MODEL in which these blocks add the same to every stream at every step."""
    patched = model.clone()
    for number, (kind, index) in enumerate(blocks):

        def block(args, extra, number=number):
            streams = {k: args[k] + 0.1 * (number + 1) for k in ("img", "txt") if k in args}
            return streams

        patched.set_model_patch_replace(block, "dit", kind, index)
    return patched


REST = [("double_block", 1), ("single_block", 0), ("single_block", 1)]


@pytest.mark.parametrize("policy, ends", [("FBCache", {}), ("DBCache", {"first_blocks": 1, "last_blocks": 1}),
                                          ("DBCache", {"first_blocks": 1, "last_blocks": 2})])  # fmt: skip
def test_a_residual_that_is_constant_is_filled_in_exactly(policy, ends):
    """From the double into the single blocks, with the text that later blocks read."""
    model, spec = model_of("flux")
    rest = constant(model, REST[: len(REST) - ends.get("last_blocks", 0)])
    patched = step(rest, policy, threshold=1.99, **ends)
    want, got = job_of(spec)(rest), job_of(spec)(patched)
    assert kinds(patched).count("s") >= 2 and error(got, want) < 1e-5
    assert error(job_of(spec)(step(rest, policy, threshold=1.99, **ends, fill="reuse")), want) > 1e-3


@pytest.mark.parametrize("first, last", [(2, 1), (3, 0), (1, 2)])
def test_dbcache_runs_its_first_and_last_blocks(first, last):
    model, spec = model_of("flux")
    patched = step(model, "DBCache", first_blocks=first, last_blocks=last)
    with watching(model) as watch:
        assert torch.isfinite(job_of(spec)(patched)).all()
    full = kinds(patched).count("f")
    assert full < STEPS
    assert watch.each == [STEPS if n < first or n >= 4 - last else full for n in range(4)]


@pytest.mark.parametrize("name", ["flux", "wan_meta"])
def test_pab_reuses_attention_and_nothing_else(name):
    """q, k and v are still computed; a foreign override underneath sees what is left."""
    model, spec = model_of(name)
    seen = []
    under = model.clone()
    under.model_options["transformer_options"] = {
        **under.model_options.get("transformer_options", {}),
        "optimized_attention_override": lambda func, *args, **kwargs: seen.append(1) or func(*args, **kwargs),
    }
    job_of(spec)(under)
    every = len(seen)
    seen.clear()
    patched = step(under, "PAB")
    job_of(spec)(patched)
    inside = told(patched)["attention_computed"] + told(patched)["attention_reused"]
    assert len(seen) == every - told(patched)["attention_reused"] and inside <= every
    # of evaluations 0 to 5, self-attention is reused at 2 and 3, cross-attention at 2 and 4
    assert told(patched)["attention_reused"] == {"flux": 4 * 2, "wan_meta": 3 * 2 + 3 * 2}[name]
    alone = step(model, "PAB", interval=1)
    job_of(spec)(alone)
    assert told(alone)["attention_reused"] == (0 if name == "flux" else 3 * 2)


def test_pab_in_its_window():
    model, spec = model_of("flux")
    patched = step(model, "PAB", interval=8, start_percent=0.45, end_percent=0.75, tail_full=0, warmup=1)
    job_of(spec, steps=10)(patched)
    sampling = model.get_model_object("model_sampling")
    start, end = sampling.percent_to_sigma(0.45), sampling.percent_to_sigma(0.75)
    assert all((d["kind"] == "reuse") == (end <= d["sigma"] <= start) for d in told(patched)["decisions"])
    assert "s" in kinds(patched)


def test_where_the_polynomial_comes_from():
    model, spec = model_of("flux")
    fitted = SimpleNamespace(tea_coefficients=(0.0, 0.0, 0.0, 2.0, 0.0), mag_ratios=(1.0,))
    errors = {}
    for source, inputs in {
        "FLUX.1": {"coefficients": "auto"},
        "the calibration": {"coefficients": "auto", "calibration": fitted},
        "the node": {"coefficients": "1 0", "calibration": fitted},
    }.items():
        patched = step(model, "TeaCache", threshold=0.01, **inputs)
        job_of(spec)(patched)
        assert told(patched)["coefficients"] == source and source in latest_record(patched)["features"][0]["line"]
        errors[source] = told(patched)["decisions"][1]["error"]
    assert errors["the calibration"] == pytest.approx(2 * errors["the node"], rel=1e-4)
    change = errors["the node"]
    published = sum(c * change**p for c, p in zip((498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
                                                  (4, 3, 2, 1, 0), strict=True))  # fmt: skip
    assert errors["FLUX.1"] == pytest.approx(abs(published), rel=1e-3)


REFUSED = [
    ("sd3", {"policy": "TeaCache"}, "not known for Stable Diffusion 3. Use policy FBCache"),
    ("flux2", {"policy": "TeaCache"}, "no published polynomial for this Flux. Connect Calibrate Cache"),
    ("flux", {"policy": "TeaCache", "coefficients": "one"}, "highest power first"),
    ("flux", {"policy": "FBCache", "level": "output"}, "cannot act at level output. Set level to auto"),
    ("flux", {"policy": "EasyCache", "level": "last_block"}, "Set level to auto or output"),
    ("flux", {"policy": "MagCache"}, "needs the ratios of a plain run: connect Calibrate Cache"),
    ("flux", {"policy": "DBCache", "first_blocks": 3, "last_blocks": 1}, "leaves none of this model's 4 to skip"),
]  # fmt: skip


@pytest.mark.parametrize("name, inputs, sentence", REFUSED)
def test_what_cannot_be_is_refused_with_a_sentence(name, inputs, sentence):
    with pytest.raises(ValueError, match=sentence):
        run_node(StepCache, model=model_of(name)[0], **inputs)


@pytest.mark.parametrize("policy", ON)
def test_unknown_models(policy, caplog):
    """What needs no blocks acts on the whole model; the others refuse, or say that they do nothing."""
    model, spec = model_of("flux")
    before = type(model.model.diffusion_model)
    model.model.diffusion_model.__class__ = type("Flux", (before,), {"__module__": "another_pack.flux"})
    try:
        if policy in ("EasyCache", "FORA", "MagCache"):
            patched = step(model, policy)
            job_of(spec)(patched)
            assert "s" in kinds(patched) and not latest_record(patched)["known"]
            return
        with pytest.raises(ValueError, match="Use policy"):
            step(model, policy)
        assert torch.equal(job_of(spec)(step(model, policy, unsupported="warn")), plain("flux", "fp32")[0])
        assert "does nothing on this MODEL" in caplog.text
    finally:
        model.model.diffusion_model.__class__ = before


def test_typed_coefficients_serve_where_nothing_was_published():
    model, spec = model_of("flux2")
    patched = step(model, "TeaCache", threshold=9.0)
    assert torch.isfinite(job_of(spec)(patched)).all() and "s" in kinds(patched)


def test_a_calibration_of_another_model_is_told(caplog):
    model, spec = model_of("flux")
    other = SimpleNamespace(**{**vars(CALIBRATION), "model": "0" * 16})
    job_of(spec)(step(model, "MagCache", calibration=other))
    assert "recorded on another model" in caplog.text


def test_a_schedule_replaces_the_gate_and_a_profile_the_settings():
    model, spec = model_of("flux")
    patched = step(model, "DBCache", threshold=0.0)
    job_of(spec)(patched)
    sigmas = tuple(d["sigma"] for d in told(patched)["decisions"])
    schedule = Schedule((True, False, True, False, False, True), sigmas)
    scheduled = step(model, "DBCache", schedule=schedule)
    job_of(spec)(scheduled)
    assert kinds(scheduled) == "fsfssf"
    profile = Profile("Step Cache", {"threshold": 1.5})
    profiled = step(model, "DBCache", threshold=0.0, profile=profile)
    assert torch.equal(job_of(spec)(profiled), job_of(spec)(step(model, "DBCache")))


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


@pytest.mark.parametrize("policy", ["FBCache", "TeaCache", "PAB"])
@pytest.mark.parametrize("first", [False, True])
def test_beside_an_attention_node_in_both_orders(policy, first):
    from tessera.nodes.attention.local_window_attention import LocalWindowAttention

    model, spec = model_of("wan_meta")
    narrow = {"radius": 1, "temporal_radius": 1, "min_tokens": 0}
    window = lambda m: run_node(LocalWindowAttention, model=m, **narrow)[0]  # noqa: E731
    patched = step(window(model), policy) if first else window(step(model, policy))
    got, other = job_of(spec)(patched), window(step(model, policy))
    served = facts(patched, "Local Window Attention")
    assert torch.equal(job_of(spec)(other), got) and "s" in kinds(patched)
    assert served["served"] == served["calls"] > 0  # the calls that are left are told apart as ever
    if policy == "PAB":
        assert served["calls"] == 3 * STEPS - 3 * 2  # self-attention was reused at two evaluations


def test_beside_lora():
    model, spec = model_of("flux")
    key = "diffusion_model.double_blocks.0.img_mlp.0.weight"
    change = torch.randn(model.model_state_dict()[key].shape, generator=torch.Generator().manual_seed(4)) * 0.2

    def lora(m):
        m = m.clone()
        assert m.add_patches({key: ("diff", (change,))}, 1.0) == [key]
        return m

    want = job_of(spec)(lora(model))
    for policy in ("FBCache", "TeaCache"):
        assert torch.equal(job_of(spec)(lora(step(model, policy, threshold=0.0))), want)
        after, before = lora(step(model, policy)), step(lora(model), policy)
        assert (
            torch.equal(job_of(spec)(after), job_of(spec)(before))
            and "s" in kinds(after)
            and kinds(after) == kinds(before)
        )


class Control(ControlBase):
    """The same residuals at every step. Core adds them in place to what blocks return."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        generator = torch.Generator().manual_seed(6)
        return {k: [torch.randn(1, 24, 128, generator=generator) for _ in range(2)] for k in ("input", "output")}


@pytest.mark.parametrize("policy", ["FBCache", "EasyCache", "PAB"])
def test_beside_a_controlnet(policy):
    model, spec = model_of("flux")
    positive, negative = ([[c, {**extra, "control": Control()}]] for ((c, extra),) in conds(spec))
    job = job_of(spec, positive=positive, negative=negative)
    rest = constant(model, REST)
    want = job(rest)
    assert torch.equal(job(step(rest, policy, threshold=0.0)), want)
    patched = step(rest, policy)
    got = job(patched)
    assert "s" in kinds(patched) and torch.isfinite(got).all()
    if policy == "FBCache":  # residuals of blocks that are skipped are part of what is stored, each once
        assert error(got, want) < 1e-5
    exact = step(rest, policy, cache_with_control=False)
    assert torch.equal(job(exact), want) and kinds(exact) == "f" * STEPS


def test_beside_context_windows():
    import comfy_extras.nodes_context_windows as windows

    model, spec = model_of("wan_meta")
    noise = torch.randn(1, 16, 8, 4, 6, generator=torch.Generator().manual_seed(3))
    job = job_of(spec, noise=noise, latent=torch.zeros_like(noise))
    for policy in ("DBCache", "EasyCache", "PAB"):
        settings = {"context_length": 4, "context_overlap": 0, "dim": 2, "causal_window_fix": False}
        cut = run_node(windows.ContextWindowsManualNode, model=step(model, policy), **settings)[0]
        together = job(cut)
        assert "s" in kinds(cut)
        if policy == "PAB":  # counted: both windows decide as clips of their own
            halves = [
                job_of(spec, noise=n, latent=torch.zeros_like(n))(step(model, policy)) for n in noise.chunk(2, dim=2)
            ]
            assert error(together, torch.cat(halves, dim=2)) < 1e-4
        else:
            assert torch.isfinite(together).all()


def test_two_caches_and_cores_easycache_are_refused():
    import comfy_extras.nodes_easycache as easycache

    model, spec = model_of("flux")
    for policy in ("FBCache", "PAB"):
        with pytest.raises(ValueError, match="already: two caches"):
            taylor(step(model, policy))
        both = run_node(easycache.EasyCacheNode, model=step(model, policy))[0]
        with pytest.raises(ValueError, match="core's EasyCache"):
            job_of(spec)(both)
