"""Region-Adaptive Sampling beside references, ControlNets, windows and other nodes, and what it keeps."""

import comfy.model_management
import comfy_extras.nodes_context_windows as windows
import comfy_extras.nodes_easycache as easycache
import pytest
import torch
from comfy.controlnet import ControlBase
from nodes_helper import Job, error, facts, model_of, run_node, taylor
from region_helper import NAME, ras, steps, told
from tiny_models import conds

from tessera.nodes.attention.local_window_attention import LocalWindowAttention


def referring(spec, method: str | None):
    """Conditions with a reference picture, whose tokens follow the image."""
    reference = torch.randn(*spec.latent[:-2], 4, 6, generator=torch.Generator().manual_seed(8))
    more = {"reference_latents": [reference], **({"reference_latents_method": method} if method else {})}
    return ([[c, {**extra, **more}] for c, extra in side] for side in conds(spec))


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_reference_tokens_are_always_computed(name):
    model, spec = model_of(name)
    positive, negative = referring(spec, None)
    job = Job(spec, positive=positive, negative=negative)
    want = job(model)
    assert error(want, Job(spec)(model)) > 1e-4  # the reference is seen
    assert error(job(ras(model, reset_every=0, region_mask=torch.ones(1, 8, 8))), want) < 1e-5
    some = ras(model)
    assert error(job(some), want) < 0.5 and steps(some) == "ffrrfrrf"


@pytest.mark.parametrize("name", ["qwen_image", "hunyuan_video"])
def test_tokens_with_a_time_step_of_their_own_are_computed_in_full(name):
    """Qwen-Image's references at time 0; a first frame that HunyuanVideo is given."""
    model, spec = model_of(name)
    guided = {"guiding_frame_index": 0} if name == "hunyuan_video" else {}
    positive, negative = ([[c, {**e, **guided}] for c, e in side] for side in referring(spec, "index_timestep_zero"))
    job, patched = Job(spec, positive=positive, negative=negative), ras(model)
    assert torch.equal(job(patched), job(model)) and steps(patched) == "f" * 8
    assert set(told(patched)["computed_in_full"]) == {"some tokens have a time step of their own"}


class Control(ControlBase):
    """A ControlNet for the tiny Flux: residuals for every image token."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        generator = torch.Generator().manual_seed(6)
        return {k: [torch.randn(1, 24, 128, generator=generator) for _ in range(2)] for k in ("input", "output")}


def test_controlnet():
    model, spec = model_of("flux")
    positive, negative = ([[c, {**extra, "control": Control()}]] for ((c, extra),) in conds(spec))
    job = Job(spec, positive=positive, negative=negative)
    want = job(model)
    assert error(job(ras(model, reset_every=0, region_mask=torch.ones(1, 8, 8))), want) < 1e-5
    some = job(ras(model))
    assert error(some, want) < 0.5 < 5 * error(want, Job(spec)(model))


def test_context_windows():
    model, spec = model_of("wan_meta")
    noise = torch.randn(1, 16, 9, 4, 6, generator=torch.Generator().manual_seed(3))
    job = Job(spec, noise=noise, latent=torch.zeros_like(noise))
    settings = {"context_length": 4, "context_overlap": 1, "context_schedule": "standard_static", "dim": 2}
    patched = run_node(windows.ContextWindowsManualNode, model=ras(model), causal_window_fix=False, **settings)[0]
    got = job(patched)
    assert steps(patched) == "ffrrfrrf" and torch.isfinite(got).all() and torch.equal(job(patched), got)


@pytest.mark.parametrize("first", [True, False])
def test_beside_an_attention_node(first):
    """Windows serve the dense steps; steps that leave tokens out attend to everything."""
    model, spec = model_of("flux")
    window = lambda m: run_node(LocalWindowAttention, model=m, radius=1, min_tokens=0)[0]  # noqa: E731
    both = ras(window(model)) if first else window(ras(model))
    assert torch.isfinite(Job(spec)(both)).all() and steps(both) == "ffrrfrrf"
    local = facts(both, "Local Window Attention")
    assert local["served"] == 4 * 4 and sum(local["declined"].values()) == 4 * 4


def test_what_is_refused():
    model, spec = model_of("flux")
    for both in (lambda: ras(taylor(model)), lambda: taylor(ras(model)), lambda: ras(ras(model))):
        with pytest.raises(ValueError, match=f"{NAME} found a .* on this MODEL: both go on from the last prediction"):
            both()
    easy = run_node(easycache.EasyCacheNode, model=ras(model))[0]
    with pytest.raises(ValueError, match="core's EasyCache or LazyCache are on the same MODEL"):
        Job(spec)(easy)
    for name in ("ltxv_meta", "cosmos_predict2", "pixart"):
        other, spec = model_of(name)
        with pytest.raises(ValueError, match="does not know which arguments of the blocks of"):
            ras(other)
        logged = ras(other, unsupported="warn")
        assert torch.equal(Job(spec, steps=2)(logged), Job(spec, steps=2)(other))


def test_region_mask_is_always_computed():
    model, spec = model_of("flux")  # 4 x 6 tokens
    mask = torch.zeros(1, 8, 12)
    mask[:, :2, :4] = 1
    patched = ras(model, region_mask=mask, reset_every=0, starvation=0.0, sample_ratio=0.25)
    Job(spec, steps=12)(patched)
    activity = torch.tensor(told(patched)["activity"])
    assert (activity[0, :2] == 1).all() and activity.min() < 0.3


@pytest.mark.parametrize("dtype, parts", [("model", 1.0), ("bfloat16", 0.5), ("fp8_e4m3", 0.25)])
def test_kv_precision(dtype, parts):
    model, spec = model_of("flux")
    full, less = ras(model), ras(model, kv_cache_dtype=dtype)
    assert error(Job(spec)(less), Job(spec)(full)) < 0.02
    scale = 1 / 128 if dtype == "fp8_e4m3" else 0  # one of 4 bytes for each row of 128 values of 4
    assert told(less)["peak_bytes"] == pytest.approx(told(full)["peak_bytes"] * (parts + scale), rel=1e-9)


def test_held_bytes_are_counted_and_refused_above_half_the_memory(monkeypatch):
    model, spec = model_of("flux")
    patched = ras(model)
    Job(spec)(patched)
    blocks, tokens, width, prompts = 4, 24, 128, 2
    held = told(patched)["peak_bytes"]
    assert held == 2 * blocks * tokens * width * prompts * 4
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *_, **__: 2 * held - 1)
    with pytest.raises(ValueError, match="would hold keys and values of 24 tokens in 4 blocks for 2 rows.*fp8_e4m3"):
        Job(spec)(patched)
    Job(spec)(ras(model, kv_cache_dtype="fp8_e4m3"))
