"""Taylor Cache at the levels that keep something of every block."""

import gc

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.controlnet import ControlBase
from nodes_helper import Job, error, facts, kinds, model_of, run_node, taylor, watching
from tiny_models import conds, empty_latent

from tessera.methods.cache.taylor import Forecast
from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.patching import cache_each
from tessera.patching.report import latest_record

INSIDE = ("flux", "wan_meta", "qwen_image", "hunyuan_video")  # whose modules are known
MODULE = [(n, d, "module") for n in INSIDE for d in ("fp32", "bf16")] + [
    (n, "fp32", "module") for n in ("chroma", "wan_vace")
]
RESIDUAL = [(n, d, "block_residual") for n in ("flux", "wan_meta") for d in ("fp32", "bf16")]
RESIDUAL += [
    (n, "fp32", "block_residual") for n in ("sd3", "ltxv_meta", "lumina2", "cosmos", "qwen_image", "ltxav_meta")
]
EVERY = pytest.mark.parametrize("name, dtype, level", MODULE + RESIDUAL, ids=lambda v: v)
LEVEL = pytest.mark.parametrize("level", ["block_residual", "module"])
NEAR = {"fp32": 1e-4, "bf16": 0.1}


@EVERY
def test_off_is_bit_equal_and_what_is_reported_is_what_ran(name, dtype, level):
    model, spec = model_of(name, dtype)
    job = Job(spec)
    with watching(model) as plain:
        want = job(model)
    off, on = taylor(model, level=level, interval=1), taylor(model, level=level)
    with watching(model) as watch:
        got = job(off)
    assert error(got, want) == 0 and watch.each == plain.each and plain.blocks > 0
    assert facts(off)["peak_bytes"] == 0 and facts(off)["blocks_computed"] == watch.blocks
    with watching(model) as watch:
        got = job(on)
    assert kinds(on) == "ffppfppf" and watch.each == [n // 2 for n in plain.each]
    assert facts(on)["blocks_computed"] == watch.blocks == facts(on)["blocks_skipped"]
    assert 1e-6 < error(got, want) < 0.8
    assert error(job(on), got) == 0 and error(job(model), want) == 0


def repeated(model, spec, calls: int = 5, **more):
    """The model's predictions for one x at one sigma, again and again, stacked."""
    made = []

    def sampler(denoiser, x, sigmas, extra_args, callback, disable):
        for _ in range(calls):
            made.append(denoiser(x, sigmas[0] * x.new_ones([x.shape[0]]), **extra_args).clone())
        return x

    positive, negative = conds(spec)
    if "control" in more:
        positive, negative = ([[c, {**extra, **more}]] for ((c, extra),) in (positive, negative))
    latent = empty_latent(spec)
    comfy.sample.sample_custom(
        model, torch.randn(latent.shape, generator=torch.Generator().manual_seed(1)), 3.0, comfy.samplers.KSAMPLER(sampler),
        torch.tensor([0.7, 0.6, 0.5, 0.4, 0.3, 0.2]), positive, negative, latent, disable_pbar=True, seed=1,
    )  # fmt: skip
    return torch.stack(made)


class Control(ControlBase):
    """Core adds these in place to what each block returns."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        generator = torch.Generator().manual_seed(6)
        return {k: [torch.randn(1, 24, 128, generator=generator) for _ in range(2)] for k in ("input", "output")}


@pytest.mark.parametrize("name, dtype, level", [c for c in MODULE + RESIDUAL if c[0] != "ltxav_meta"], ids=lambda v: v)
def test_where_nothing_changes_a_forecast_is_what_is_computed(name, dtype, level):
    """Bit for bit from module outputs: the gated sums are the blocks' own. (LTX-2's latent is two tensors: not here.)"""
    model, spec = model_of(name, dtype)
    settings = {"level": level, "interval": 3, "warmup": 1, "tail_full": 0, "variable": "sigma"}
    cases = [(0, {}), *([(2, {}), (0, {"control": Control()})] if name == "flux" else [])]
    for order, more in cases:
        patched = taylor(model, order=order, **settings)
        got = repeated(patched, spec, **more)
        assert kinds(patched) == "fppfp"
        same = torch.equal(got, got[:1].expand_as(got))
        assert same if level == "module" else error(got, got[:1].expand_as(got)) < {"fp32": 1e-5, "bf16": 2e-2}[dtype]
        assert error(got[0], repeated(model, spec, 1, **more)[0]) == 0


def test_gates_are_those_of_the_true_timestep():
    """With each module's output reused, the picture still differs from the one with each block's sum reused."""
    model, spec = model_of("flux")
    settings = {"order": 0, "interval": 8, "warmup": 1, "tail_full": 0}
    by_module, by_block = (Job(spec)(taylor(model, level=level, **settings)) for level in ("module", "block_residual"))
    assert error(by_module, by_block) > 1e-4


@pytest.mark.parametrize("name", ["flux", "wan_meta"])
@LEVEL
def test_more_evaluations_cost_less_quality(name, level):
    model, spec = model_of(name)
    job = Job(spec, steps=20, cfg=1.0)
    want = job(model)
    errors = [error(job(taylor(model, level=level, interval=n, warmup=3)), want) for n in (2, 4, 12)]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("name, dtype, level", [
    ("flux", "bf16", "module"), ("wan_meta", "fp32", "module"), ("qwen_image", "fp32", "module"),
    ("hunyuan_video", "fp32", "module"), ("flux", "fp32", "block_residual"), ("ltxv_meta", "fp32", "block_residual"),
    ("lumina2", "fp32", "block_residual"),
])  # fmt: skip
def test_separate_cfg_decides_as_joined_cfg(name, dtype, level, monkeypatch):
    model, spec = model_of(name, dtype)
    patched, job = taylor(model, level=level), Job(spec)
    joined = job(patched)
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 0)
    separate = job(patched)
    assert latest_record(patched)["forwards"] == 16 and kinds(patched) == "ffppfppf"
    assert error(separate, joined) < NEAR[dtype]


@pytest.mark.parametrize("name", ["flux", "wan_meta", "qwen_image"])
@LEVEL
def test_a_batch_is_its_pictures(name, level):
    model, spec = model_of(name)
    patched = taylor(model, level=level)
    noises = [torch.randn(spec.latent, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    single = [Job(spec, noise=noise)(patched) for noise in noises]
    assert error(Job(spec, noise=torch.cat(noises), batch=2)(patched), torch.cat(single)) < 1e-4


@pytest.mark.parametrize("name", INSIDE)
@LEVEL
def test_memory_is_counted_reported_and_reserved(name, level, monkeypatch):
    model, spec = model_of(name)
    asked, load = [], comfy.model_management.load_models_gpu

    def load_models_gpu(models, memory_required=0, **rest):
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **rest)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load_models_gpu)
    Job(spec)(model)
    patched = taylor(model, level=level, order=2)
    Job(spec)(patched)
    held = facts(patched)["peak_bytes"]
    assert held <= asked[1] - asked[0] <= 2 * held
    if name == "wan_meta":
        assert held == 2 * 3 * 3 * {"module": 3, "block_residual": 1}[level] * 5 * 4 * 6 * 96 * 4
    other = taylor(model, level=level, order=2, cache_device="cpu", cache_dtype="bfloat16")
    Job(spec)(other)
    assert asked[2] == asked[0] and 2 * facts(other)["peak_bytes"] == held


@LEVEL
@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_too_much_memory_is_refused(level, device, monkeypatch):
    model, spec = model_of("wan_meta")
    fits = taylor(model, level=level, cache_device=device)
    Job(spec)(fits)
    held = facts(fits)["peak_bytes"]
    for room in (2, 1.98):
        monkeypatch.setattr(cache_each.comfy.model_management, "get_total_memory", lambda *_, r=room, **__: r * held)
        if room == 2:
            Job(spec)(fits)
        else:
            with pytest.raises(
                ValueError, match=f"would hold .* GiB at level {level} for this size.*Set level to last_block"
            ):
                Job(spec)(fits)
            assert torch.isfinite(Job(spec)(taylor(model, level=level, interval=1))).all()


@LEVEL
@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "heunpp2", "euler_ancestral"])
def test_samplers(sampler, level):
    model, spec = model_of("flux")
    job, patched = Job(spec, sampler=sampler, steps=10), taylor(model, level=level)
    got = job(patched)
    assert torch.isfinite(got).all() and facts(patched)["forecast"] >= 3 and torch.equal(job(patched), got)


@pytest.mark.parametrize("name", ["flux", "wan_meta"])
@LEVEL
def test_interrupts_leave_nothing_and_branches_do_not_meet(name, level):
    model, spec = model_of(name)
    plain, patched = Job(spec)(model), taylor(model, level=level)
    want = Job(spec)(patched)

    def on_step(step):
        if step == 4:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        Job(spec, on_step=on_step)(patched)
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is Forecast]
    assert torch.equal(Job(spec)(patched), want)
    second = taylor(model, level=level, interval=4)  # made while the first one's patches lie on the modules
    two = Job(spec)(second)
    assert torch.equal(Job(spec)(model), plain) and torch.equal(Job(spec)(patched), want)
    comfy.model_management.unload_all_models()
    assert torch.equal(Job(spec)(second), two) and not torch.equal(two, want)
    latent = torch.randn(spec.latent, generator=torch.Generator().manual_seed(3))
    assert torch.isfinite(Job(spec, denoise=0.4, latent=latent)(patched)).all() and kinds(patched) == "ffppfppf"
    Job(spec, steps=1)(model)
    assert not any(
        isinstance(m.forward, cache_each.GatedForward | cache_each.ToldForward) for m in model.model.modules()
    )


@LEVEL
def test_beside_an_attention_node_and_a_lora(level):
    model, spec = model_of("flux")
    job, reach = Job(spec), {"radius": 2, "min_tokens": 0}
    one = run_node(LocalWindowAttention, model=taylor(model, level=level), **reach)[0]
    two = taylor(run_node(LocalWindowAttention, model=model, **reach)[0], level=level)
    assert torch.equal(job(one), job(two)) and kinds(one) == "ffppfppf"
    key = "diffusion_model.double_blocks.0.img_mlp.0.weight"
    change = torch.randn(model.model_state_dict()[key].shape, generator=torch.Generator().manual_seed(4)) * 0.2

    def lora(m):
        m = m.clone()
        m.add_patches({key: ("diff", (change,))}, 1.0)
        return m

    assert torch.equal(job(lora(taylor(model, level=level))), job(taylor(lora(model), level=level)))
    assert torch.equal(job(taylor(lora(model), level=level, interval=1)), job(lora(model)))


def test_other_families_and_exchanged_blocks_are_refused(caplog):
    model, spec = model_of("sd3")
    with pytest.raises(
        ValueError, match="does not know the modules inside the blocks of .*Use level=last_block or block_"
    ):
        taylor(model, level="module")
    warned = taylor(model, level="module", unsupported="warn")
    assert torch.equal(Job(spec)(warned), Job(spec)(model)) and "does not know the modules" in caplog.text
    model, _ = model_of("wan_ar")
    with pytest.raises(ValueError, match="does not know the modules inside CausalWanAttentionBlock"):
        taylor(model, level="module")
    model, _ = model_of("flux")
    exchanged = model.clone()
    exchanged.add_object_patch("diffusion_model.double_blocks.1.forward", lambda *a, **k: None)
    with pytest.raises(ValueError, match="another node has exchanged the forward of diffusion_model.double_blocks.1"):
        taylor(exchanged, level="module")
