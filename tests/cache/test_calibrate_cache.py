"""Calibrate Cache on tiny models: the run is the plain one, and what is recorded is the last block's."""

import gc
import weakref

import pytest
import torch
from calibration_helper import calibrate
from nodes_helper import Job, model_of, taylor
from tiny_models import empty_latent

import comfy.model_management  # isort: skip

from tessera.methods.cache.calibration import Calibration
from tessera.patching import calibrate as m
from tessera.patching.sizes import fingerprint

KNOWN = [("flux", "fp32"), ("flux", "bf16"), ("wan_meta", "bf16"), ("sd3", "fp32"), ("ltxv_meta", "fp32"),
         ("lumina2", "fp32"), ("cosmos_predict2", "fp32"), ("hunyuan_video", "fp32")]  # fmt: skip


@pytest.mark.parametrize("name, dtype", KNOWN)
def test_every_architecture(name, dtype):
    model, spec = model_of(name, dtype)
    found, text, latent = calibrate(model, spec)
    assert Calibration.from_json(text) == found
    assert (found.level, found.steps, found.sampler) == ("last_block", 6, "sample_euler")
    assert found.model == fingerprint(model.model.diffusion_model)
    assert found.mag_ratios[0] == 1 and all(0.2 < r < 5 for r in found.mag_ratios)
    assert all(0 < found.rel_l1[i][i + 1] < 2 and found.cosine[i][i + 1] > 0 for i in range(5))
    assert all(found.cosine[i][i] == pytest.approx(1, abs=1e-5) and found.rel_l1[i][i] == 0 for i in range(6))
    assert found.forecast_error((1, 0), 2) < found.forecast_error((1, 0), 5)
    assert latent["samples"].shape == empty_latent(spec).shape


def test_the_run_is_the_plain_one_and_leaves_nothing():
    model, spec = model_of("flux")
    want = Job(spec, steps=6)(model)
    options = {**model.model_options["transformer_options"]}
    out = calibrate(model, spec)
    assert torch.equal(out[2]["samples"], want)
    assert model.model_options["transformer_options"] == options
    assert out.ui["tessera_report"][0]["kind"] == "lines" and len(out.ui["tessera_report"][0]["lines"]) == 4
    assert calibrate(model, spec)[1] == out[1]
    assert calibrate(model, spec, seed=5)[1] != out[1]


def test_it_records_the_last_blocks_output():
    """Against hooks on the model's own modules."""
    model, spec = model_of("wan_meta")
    seen = []
    blocks = model.model.diffusion_model.blocks
    hooks = [
        blocks[0].register_forward_pre_hook(lambda _, args: seen.append([args[0].clone()])),
        blocks[-1].register_forward_hook(lambda _, args, out: seen[-1].append(out.clone())),
    ]
    try:
        found = calibrate(model, spec, steps=5)[0]
    finally:
        for hook in hooks:
            hook.remove()
    assert len(seen) == 5  # joined CFG: both conditions in one call, the first rows are those of forward.keys[0]
    half = seen[0][0].shape[0] // 2
    before, after = ([call[k][:half].flatten(0, 1) for call in seen] for k in (0, 1))
    lengths = [(b - a).norm(dim=-1) for a, b in zip(before, after, strict=True)]
    ratios = [1.0, *(float((new / old).mean()) for old, new in zip(lengths, lengths[1:], strict=False))]
    assert found.mag_ratios == pytest.approx(ratios, rel=1e-4)
    if found.signal == "input":
        changes = [float((b - a).abs().mean() / a.abs().mean()) for a, b in zip(before, before[1:], strict=False)]
        assert found.signal_change[1:] == pytest.approx(changes, rel=1e-4)
    moved = [float((b - a).abs().mean() / a.abs().mean()) for a, b in zip(after, after[1:], strict=False)]
    assert found.output_change[1:] == pytest.approx(moved, rel=1e-4)


def test_the_signal_is_the_modulated_input_where_the_family_tells(monkeypatch):
    model, spec = model_of("flux")
    level = iter(range(1, 100))
    monkeypatch.setattr(m.Forward, "modulated", lambda forward: torch.full((1, 1, 8), float(next(level))))
    found = calibrate(model, spec)[0]
    assert found.signal == "modulated"
    assert found.signal_change == pytest.approx((0, 1, 1 / 2, 1 / 3, 1 / 4, 1 / 5), abs=1e-6)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "uni_pc"])
def test_samplers(sampler):
    model, spec = model_of("flux")
    assert calibrate(model, spec, sampler=sampler)[0].steps == 6


def test_batches_and_unknown_blocks():
    model, spec = model_of("flux")
    assert calibrate(model, spec, batch=2)[0].steps == 6
    kind = type(model.model.diffusion_model)
    model.model.diffusion_model.__class__ = type("Flux", (kind,), {"__module__": "another_pack.flux"})
    try:
        found = calibrate(model, spec)[0]
    finally:
        model.model.diffusion_model.__class__ = kind
    assert found.level == "output" and found.signal == "input" and found.forecast_error((1, 0), 2) > 0


def test_interrupt_frees_what_was_recorded(monkeypatch):
    model, spec = model_of("flux")
    before = calibrate(model, spec)[1]
    held = []
    add = m.Recorder.add

    def watched(recorder, *args):
        add(recorder, *args)
        held.append(weakref.ref(recorder.features[-1]))
        if len(held) == 3:
            comfy.model_management.interrupt_current_processing()

    with monkeypatch.context() as patch:
        patch.setattr(m.Recorder, "add", watched)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            calibrate(model, spec)
    gc.collect()
    assert len(held) == 3 and not any(ref() is not None for ref in held)
    assert calibrate(model, spec)[1] == before


def test_what_is_refused():
    model, spec = model_of("flux")
    with pytest.raises(ValueError, match="Taylor Cache is on this MODEL. Connect the MODEL from before it"):
        calibrate(taylor(model), spec)
    with pytest.raises(ValueError, match="at least 2 steps, got 1"):
        calibrate(model, spec, steps=1)
    restart = torch.tensor([1.0, 0.6, 0.2, 0.8, 0.3, 0.0])
    assert calibrate(model, spec, sigmas=restart)[0].steps == 5  # every step is met, in its order
    recording = m.Recording(0)
    recording.about, recording.steps = ("", "", [1.0, 0.5, 0.2], "sigma"), [0, 2]
    with pytest.raises(ValueError, match=r"missed \[1\]"):
        recording.calibration()
