"""Confidence Taylor Cache as a node, on stock models."""

import gc
import math
import weakref

import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from comfy.controlnet import ControlBase
from confidence_helper import between, confident, decided, errors, told
from nodes_helper import Job, error, kinds, model_of, run_node, taylor, watching
from tiny_models import conds

from tessera.methods.cache.confidence import Confidence
from tessera.methods.cache.taylor import Forecast
from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.patching.report import latest_record

MODELS = [
    ("flux", "fp32"), ("flux", "bf16"), ("wan_meta", "fp32"), ("wan_meta", "bf16"), ("sd3", "fp32"), ("ltxv_meta", "fp32"),
    ("lumina2", "fp32"), ("cosmos", "fp32"),
]  # fmt: skip
EVERY = pytest.mark.parametrize("name, dtype", MODELS)
LEVEL = pytest.mark.parametrize("level", ["last_block", "output"])
BOTH = pytest.mark.parametrize(
    "name, dtype, level", [(*m, "last_block") for m in MODELS] + [("flux", "bf16", "output"), ("sd3", "fp32", "output")]
)


@BOTH
def test_threshold_0_is_bit_equal_with_the_hooks_firing(name, dtype, level):
    model, spec = model_of(name, dtype)
    job = Job(spec)
    with watching(model) as plain:
        want = job(model)
    for off in ({"threshold": 0.0}, {"max_consecutive": 0})[: 2 if name == "flux" else 1]:
        patched = confident(model, level=level, **off)
        with watching(model) as watch:
            assert torch.equal(job(patched), want)
        assert watch.each == plain.each and plain.blocks > 0
        assert told(patched)["blocks_computed"] == watch.blocks and told(patched)["blocks_skipped"] == 0
        assert decided(patched) == "f" * 8 and told(patched)["peak_bytes"] == 0


@EVERY
def test_without_a_limit_it_is_taylor_cache_after_its_warm_up(name, dtype):
    """Bit for bit, but for the first block, which is computed at every evaluation."""
    model, spec = model_of(name, dtype)
    job = Job(spec)
    endless = confident(model, threshold=math.inf, last_order=1)
    with watching(model) as watch:
        got = job(endless)
    want = taylor(model, interval=20, warmup=2)
    assert torch.equal(got, job(want)) and decided(endless) == kinds(want) == "ffpppppf"
    first, *rest = watch.each
    assert rest == [3 * first // 8] * len(rest) and told(endless)["blocks_computed"] == watch.blocks
    assert told(endless)["blocks_skipped"] == 5 * first // 8 * len(rest)


@BOTH
def test_it_judges_and_reports(name, dtype, level):
    model, spec = model_of(name, dtype)
    job = Job(spec, steps=10)
    patched = between(model, job, level=level)
    with watching(model) as plain:
        want = job(model)
    with watching(model) as watch:
        got = job(patched)
    found = decided(patched)
    assert found[:2] == "ff" and found[-1] == "f" and 0 < found[2:-1].count("p") < 8
    assert told(patched)["blocks_computed"] == watch.blocks
    assert told(patched)["blocks_skipped"] == plain.blocks - watch.blocks > 0
    assert len(told(patched)["decisions"]) == 10 and all(e is None or e >= 0 for e in errors(patched))
    if level == "last_block":
        assert errors(patched)[0] is None and all(e is not None for e in errors(patched)[1:])
    assert torch.isfinite(got).all() and 1e-6 < error(got, want) < 1
    assert torch.equal(job(patched), got)  # the same seed twice
    assert torch.equal(job(model), want)


@EVERY
def test_separate_cfg_decides_as_joined_cfg(name, dtype, monkeypatch):
    model, spec = model_of(name, dtype)
    job = Job(spec, steps=10)
    for settings in ({}, {"gate_on": "max"}, {"level": "output"}) if name == "flux" else ({},):
        patched = between(model, job, **settings)
        joined, want = job(patched), decided(patched)
        with monkeypatch.context() as low:
            low.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 0)
            separate = job(patched)
        assert latest_record(patched)["forwards"] == 20 and decided(patched) == want and "p" in want[2:]
        assert error(separate, joined) < (1e-4 if dtype == "fp32" else 0.1)


@pytest.mark.parametrize("first, last", [(1, 1), (0, 2), (3, 1)])
def test_memory_is_two_histories_a_stream_and_no_more(first, last, monkeypatch):
    """Wan: the first and the last block's outputs are of one size. The gate's history holds one prompt only."""
    model, spec = model_of("wan_meta")
    tokens, one = 5 * 4 * 6, 5 * 4 * 6 * 96 * 4  # fp32
    assert tokens * 96 * 4 == one
    asked, load = [], comfy.model_management.load_models_gpu

    def load_models_gpu(models, memory_required=0, **rest):
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **rest)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load_models_gpu)
    Job(spec)(model)
    for cfg, streams in ((1.0, 1), (3.0, 2)):
        patched = confident(model, first_order=first, last_order=last, warmup=5)
        Job(spec, cfg=cfg)(patched)
        assert told(patched)["peak_bytes"] == ((first + 1) + (last + 1) * streams) * one
        assert told(patched)["peak_bytes"] <= asked[-1] - asked[0] <= 2 * told(patched)["peak_bytes"] * 2 / streams


@LEVEL
@pytest.mark.parametrize("sampler, multi_eval", [
    ("heun", "count_each"), ("dpm_2", "count_each"), ("heun", "skip_whole_steps"), ("euler_ancestral", "count_each"),
    ("heunpp2", "count_each"),
])  # fmt: skip
def test_samplers(sampler, level, multi_eval):
    model, spec = model_of("flux")
    job, patched = (
        Job(spec, sampler=sampler, steps=10),
        confident(model, threshold=2.0, level=level, multi_eval=multi_eval),
    )
    got = job(patched)
    assert torch.isfinite(got).all() and told(patched)["forecast"] >= 3
    assert torch.equal(job(patched), got)
    if multi_eval == "skip_whole_steps" or sampler == "heunpp2":
        steps: dict[int, set] = {}
        for d in told(patched)["decisions"]:
            steps.setdefault(d["step"], set()).add(d["kind"])
        assert all(len(kind) == 1 for kind in steps.values())


@LEVEL
def test_partial_denoise_and_two_samplers_on_one_model(level):
    model, spec = model_of("flux")
    latent = torch.randn(spec.latent, generator=torch.Generator().manual_seed(3))
    img2img, other = Job(spec, denoise=0.4, latent=latent), Job(spec, steps=5, sampler="heun", seed=1)
    patched = confident(model, level=level, threshold=1.0)
    a, b = img2img(patched), other(patched)
    img2img(patched)
    assert torch.isfinite(a).all() and "p" in decided(patched) and decided(patched)[:2] == "ff"
    assert torch.equal(img2img(patched), a) and torch.equal(other(patched), b)
    assert torch.equal(img2img(confident(model, level=level, threshold=1.0)), a)


@LEVEL
@pytest.mark.parametrize("name", ["flux", "lumina2"])
def test_interrupt_then_rerun_and_nothing_is_held(name, level):
    model, spec = model_of(name)
    patched = confident(model, level=level, threshold=0.5)
    want, held = Job(spec)(patched), []

    def on_step(step):
        if step == 4:
            gc.collect()
            alive = [o for o in gc.get_objects() if type(o) in (Forecast, Confidence)]
            held.extend(weakref.ref(t) for f in alive if type(f) is Forecast for t in f._features)
            held.extend(weakref.ref(f) for f in alive)
            raise comfy.model_management.InterruptProcessingException

    try:
        Job(spec, on_step=on_step)(patched)
    except comfy.model_management.InterruptProcessingException as stop:
        stop.__traceback__ = None
    gc.collect()
    assert len(held) >= 6 and not [ref for ref in held if ref() is not None]
    assert not [o for o in gc.get_objects() if type(o) in (Forecast, Confidence)]
    assert latest_record(patched)["ended"] == "interrupted"
    assert torch.equal(Job(spec)(patched), want)


def test_beside_an_attention_node_a_lora_and_another_cache():
    model, spec = model_of("flux")
    job = Job(spec)
    reach = {"radius": 2, "min_tokens": 0}
    one = run_node(LocalWindowAttention, model=confident(model, threshold=0.5), **reach)[0]
    two = confident(run_node(LocalWindowAttention, model=model, **reach)[0], threshold=0.5)
    assert torch.equal(job(one), job(two)) and "p" in decided(one) and decided(one) == decided(two)
    key = "diffusion_model.double_blocks.0.img_mlp.0.weight"
    change = torch.randn(model.model_state_dict()[key].shape, generator=torch.Generator().manual_seed(4)) * 0.2

    def lora(m):
        m = m.clone()
        m.add_patches({key: ("diff", (change,))}, 1.0)
        return m

    assert torch.equal(job(lora(confident(model, threshold=0.5))), job(confident(lora(model), threshold=0.5)))
    assert torch.equal(job(confident(lora(model), threshold=0.0)), job(lora(model)))
    with pytest.raises(ValueError, match="found a Taylor Cache on this MODEL already"):
        confident(taylor(model))


def test_unknown_blocks_are_refused_and_served_at_level_output():
    model, spec = model_of("flux")
    before = type(model.model.diffusion_model)
    model.model.diffusion_model.__class__ = type("Flux", (before,), {"__module__": "another_pack.flux"})
    try:
        with pytest.raises(
            ValueError, match="Confidence Taylor Cache does not know the blocks of Flux. Use level=output"
        ):
            confident(model)
        patched = confident(model, level="output", threshold=math.inf)
        assert torch.isfinite(Job(spec)(patched)).all() and "p" in decided(patched)
    finally:
        model.model.diffusion_model.__class__ = before


class Control(ControlBase):
    """Residuals of a size that depends on sigma."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        return {"input": [torch.full((x_noisy.shape[0], 1, 1), self.size(float(t.flatten()[0])))], "output": []}


def test_a_control_that_jumps_is_computed():
    model, spec = model_of("flux")

    def found(size):
        positive, negative = ([[c, {**extra, "control": Control(size)}]] for ((c, extra),) in conds(spec))
        patched = confident(model, threshold=math.inf)
        Job(spec, steps=10, positive=positive, negative=negative)(patched)
        return decided(patched)

    assert found(lambda s: 0.5) == "ff" + "p" * 7 + "f"
    assert found(lambda s: 0.5 if s > 0.6 else 2.0).count("f") == 4
