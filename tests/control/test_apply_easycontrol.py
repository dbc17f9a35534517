"""Apply EasyControl on the stock FLUX class against the one masked sequence that it stands for, written out in the helper."""

import pytest
import torch
from easycontrol_helper import forward
from easycontrol_nodes import NAME, applied, conditions, latent, network_calls
from nodes_helper import Job, error, facts, model_of

from tessera.patching.easycontrol_apply import prepared

CASES = {
    "one layout": [{"seed": 1}],
    "a layout of odd size": [{"seed": 1, "h": 5, "w": 3}],
    "a subject": [{"seed": 2, "mode": "subject"}],
    "two that do not see each other": [{"seed": 1}, {"seed": 2, "mode": "subject", "h": 4, "w": 4}],
    "weak and strong": [{"seed": 1, "strength": 0.3}, {"seed": 2, "strength": 1.7, "lora_scale": 0.4}],
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_equals_one_masked_sequence(name, cfg):
    model, spec = model_of("flux")
    parts = []
    for case in CASES[name]:
        case = dict(case)
        samples = latent(case["seed"] + 10, case.pop("h", 6), case.pop("w", 8))
        seed, mode = case.pop("seed"), case.pop("mode", "spatial")
        model = applied(model, seed, samples, mode=mode, **case)
        scale = case.pop("lora_scale", 1.0)
        parts.append(dict(samples=samples, seed=seed, subject=mode == "subject", scale=scale, **case))
    with network_calls(model) as (calls, alone):
        Job(spec, steps=3, cfg=cfg, latent=torch.zeros(1, 16, 8, 12))(model)
    assert len(calls) == 3 and len(alone) == len(parts) * (1 if cfg == 1 else 2)
    network = model.model.diffusion_model
    for x, t, context, y, guidance, out in calls:
        want = forward(network, x, t, context, y, guidance, conditions(model, *[dict(p) for p in parts]))
        assert error(out, want) < 1e-5


def test_the_reference_sees_the_condition():
    model, spec = model_of("flux")
    with network_calls(applied(model)) as (calls, _):
        Job(spec, steps=1, cfg=1.0)(applied(model))
    x, t, context, y, guidance, out = calls[0]
    bare = forward(model.model.diffusion_model, x, t, context, y, guidance, [])
    assert error(out, bare) > 1e-2


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_recomputing_changes_nothing(dtype):
    model, spec = model_of("flux", dtype)
    job = Job(spec, steps=4, batch=2)
    kept, again = applied(model), applied(model, cache="recompute")
    assert torch.equal(job(kept), job(again))
    assert facts(kept, NAME)["passes"] == 2 and facts(again, NAME)["passes"] == 8


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("inputs", [{"strength": 0.0}, {"start_percent": 1.0}, {"end_percent": 0.0}])
def test_off_is_the_base_bit_for_bit(dtype, inputs):
    model, spec = model_of("flux", dtype)
    job = Job(spec, steps=3)
    assert torch.equal(job(applied(model, **inputs)), job(model))


def test_acts_between_its_steps_only():
    model, spec = model_of("flux")
    part = applied(model, start_percent=0.3, end_percent=0.8)
    with network_calls(part) as (calls, alone):
        Job(spec, steps=6, cfg=1.0)(part)
    network, found = model.model.diffusion_model, []
    for x, t, context, y, guidance, out in calls:
        bare = error(out, forward(network, x, t, context, y, guidance, [])) < 1e-5
        whole = conditions(part, {"samples": latent(), "seed": 1})
        assert bare != (error(out, forward(network, x, t, context, y, guidance, whole)) < 1e-5)
        found.append(not bare)
    assert True in found and found[0] is False and found[-1] is False and len(alone) == 1


def test_cached_steps_compute_no_condition_token():
    model, spec = model_of("flux")
    seen = []
    hooks = [
        m.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
        for n, m in model.model.diffusion_model.named_modules()
        if n.endswith(("qkv", "linear1", "linear2", "img_mlp.0", "img_mlp.2"))
    ]
    try:
        Job(spec, steps=4, cfg=1.0)(applied(model))
        ours = sum(seen)
        seen.clear()
        Job(spec, steps=4, cfg=1.0)(model)
    finally:
        for hook in hooks:
            hook.remove()
    once, text = 12 + 1, 1  # 6 x 8 latent cells: 12 tokens, and one of text, once
    doubles = 2 * (3 * (once - text) + text + 0)  # qkv of the image, two MLP layers; qkv of the text
    singles = 2 * 2 * once
    assert ours - sum(seen) == doubles + singles


def test_each_picture_has_its_own_condition():
    model, spec = model_of("flux")
    samples = latent(batch=2)
    both = Job(spec, steps=2, batch=2)
    noise = torch.randn(1, *spec.latent[1:], generator=torch.Generator().manual_seed(3)).repeat(2, 1, 1, 1)
    both.noise = noise
    got = both(applied(model, samples=samples))
    for i in range(2):
        one = Job(spec, steps=2, noise=noise[:1])(applied(model, samples=samples[i : i + 1]))
        assert error(got[i : i + 1], one) < 1e-5
    assert error(got[:1], got[1:]) > 1e-2


def test_separate_conditions_draw_as_joined_ones(monkeypatch):
    import comfy.model_management
    from comfy.model_base import BaseModel

    model, spec = model_of("flux")
    joined = Job(spec, steps=2)(applied(model))
    monkeypatch.setattr(
        comfy.model_management, "get_free_memory", lambda d=None, both=False: (1 << 40, 0) if both else 1
    )
    monkeypatch.setattr(BaseModel, "memory_required", lambda *a, **k: 1 << 40)
    with network_calls(model) as (calls, _):
        apart = Job(spec, steps=2)(applied(model))
    assert len(calls) == 4 and error(apart, joined) < 1e-5


def test_a_rerun_is_equal_and_nothing_stays():
    import gc
    import weakref

    import tessera.patching.easycontrol as module

    model, spec = model_of("flux")
    patched, states = applied(model), []
    begin = module.EasyControlFeature.begin

    def watched(self, run):
        state = begin(self, run)
        states.append(weakref.ref(state))
        return state

    module.EasyControlFeature.begin = watched
    try:
        job = Job(spec, steps=2)
        assert torch.equal(job(patched), job(patched))
        broken = Job(spec, steps=3, on_step=lambda step: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            broken(patched)
        assert torch.equal(job(patched), job(patched))
    finally:
        module.EasyControlFeature.begin = begin
    gc.collect()
    assert len(states) == 5 and not any(state() for state in states)
    assert not any(m._forward_hooks for m in model.model.diffusion_model.modules())


def test_a_failing_pass_leaves_no_lora_behind():
    model, spec = model_of("flux")
    plain = Job(spec, steps=2)(model)
    block = model.model.diffusion_model.single_blocks[1]
    handle = block.register_forward_pre_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Job(spec, steps=2)(applied(model))
    handle.remove()
    assert torch.equal(Job(spec, steps=2)(model), plain)


def test_eight_bits_cost_little_and_hold_half():
    model, spec = model_of("flux", "bf16")
    job = Job(spec, steps=3)
    wide, narrow = applied(model), applied(model, kv_dtype="fp8_e4m3")
    want, got = job(wide), job(narrow)
    assert 0 < error(got, want) < 0.05
    assert facts(narrow, NAME)["bytes"] < 0.52 * facts(wide, NAME)["bytes"]


def test_flops_of_the_issue():
    from tessera.patching.easycontrol import flops_ratio

    assert flops_ratio(4096 + 512, 3072, 1024) == pytest.approx(1.18, abs=0.01)
    assert flops_ratio(1024 + 512, 3072, 2048) == pytest.approx(2.2, abs=0.1)


def test_other_models_are_refused():
    for name, word in (("sd3", "Stable Diffusion 3"), ("flux2", "FLUX.2"), ("chroma", "Chroma")):
        with pytest.raises(ValueError, match=r"FLUX\.1-dev") as refused:
            applied(
                model_of(name)[0], samples=torch.zeros(1, model_of(name)[0].model.latent_format.latent_channels, 4, 4)
            )
        assert word in str(refused.value)


def test_a_network_that_takes_a_second_latent_is_refused():
    """A LoRA of FLUX.1 Canny or Depth widens the first layer; Fill, Canny and Depth have it so."""
    model, spec = model_of("flux")
    wide = model.clone()
    wide.add_patches({"diffusion_model.img_in.weight": ("diff", (torch.zeros(128, 128), {"pad_weight": True}))})
    with pytest.raises(ValueError, match=r"16 channels, and this MODEL takes 32: .* FLUX\.1-dev"):
        Job(spec, steps=1, cfg=1.0)(applied(wide))
    Job(spec, steps=1, cfg=1.0)(applied(wide, strength=0.0))
    feature = applied(model).model_options["transformer_options"]["tessera_features"][0]
    with pytest.raises(ValueError, match="this MODEL takes 96"):
        feature._takes(96)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("subject", [False, True])
def test_images_of_any_channels_fill_the_square(channels, subject):
    image = torch.linspace(0, 1, 20 * 30).reshape(1, 20, 30, 1).repeat(1, 1, 1, channels)
    made = prepared(image, subject, 64)
    assert made.shape == (1, 64, 64, 3)
    top = made[0, 0, :, 0]
    assert torch.allclose(top, torch.full_like(top, 0.5)) == subject  # grey above what is wider than high
