"""The measured response, what is made of it, and the node that applies it."""

import comfy.samplers
import comfy.sd
import pytest
import torch
from lora_helper import loras, tensors  # noqa: F401 - a fixture
from nodes_helper import Job, model_of, run_node
from tiny_models import conds, empty_latent

from tessera.methods.control.lora_curve import from_json
from tessera.nodes.control.apply_calibrated_lora import ApplyCalibratedLora
from tessera.nodes.control.calibrate_lora_strength import CalibrateLoraStrength

STEPS = 2


class Noise:
    seed = 7

    def generate_noise(self, latent):
        return torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(7))


def calibrated(name, lora, **inputs):
    model, spec = model_of(name)
    positive, negative = conds(spec)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    given = {
        "model": model, "lora": lora, "positive": positive, "negative": negative, "noise": Noise(), "cfg": 3.0,
        "latent": {"samples": empty_latent(spec)}, "sampler": comfy.samplers.sampler_object("euler"), "sigmas": sigmas,
    }  # fmt: skip
    return run_node(CalibrateLoraStrength, **given | inputs), model, spec


def plain_run(model, spec, held, strength):
    patched = comfy.sd.load_lora_for_models(model, None, held, strength, 0)[0] if strength else model
    job = Job(spec, steps=STEPS, noise=Noise().generate_noise({"samples": empty_latent(spec)}))
    return job(patched)


def test_responses_are_those_of_cores_own_runs(loras):  # noqa: F811
    held = tensors("flux", "kohya")
    out, model, spec = calibrated("flux", loras("a.safetensors", held), strengths="0, 0.5, 1, 1.5")
    curve = out[0]
    base = plain_run(model, spec, held, 0)
    want = [float((plain_run(model, spec, held, s) - base).abs().mean()) for s in (0.0, 0.5, 1.0, 1.5)]
    assert curve.responses == pytest.approx(want, rel=1e-5, abs=1e-9) and curve.responses[0] == 0
    assert from_json(out[1]) == curve and out[2].shape[0] == 1
    (panel,) = out.ui["tessera_report"]
    assert panel["lines"][0].startswith("a.safetensors: mean |latent") and not model.patches


def test_motion_counts_frames(loras):  # noqa: F811
    held = tensors("wan", "core", size=3.0)
    out, model, spec = calibrated("wan", loras("a.safetensors", held), measure="motion", strengths="0, 1")
    want = []
    for strength in (0.0, 1.0):
        latent = plain_run(model, spec, held, strength)
        want.append(float((latent[:, :, 1:] - latent[:, :, :-1]).abs().mean()))
    assert out[0].responses == pytest.approx(want, rel=1e-5) and min(want) > 0
    name = loras("b.safetensors", tensors("flux", "core"))
    with pytest.raises(ValueError, match=r"video of at least 2 latent frames, got a latent \[1, 16, 8, 12\]"):
        calibrated("flux", name, measure="motion", strengths="0, 1")


def test_applied_strengths_make_the_response_linear(loras):  # noqa: F811
    held = tensors("flux", "kohya", size=6.0)
    out, model, spec = calibrated("flux", loras("a.safetensors", held), strengths="0, 0.125, 0.25, 0.5, 0.75, 1, 1.5")
    base, asked, got = plain_run(model, spec, held, 0), [0.25, 0.5, 0.75, 1.0], []
    for amount in asked:
        applied = run_node(ApplyCalibratedLora, model=model, lora="a.safetensors", amount=amount, curve=out[0])
        latent = plain_run(applied[0], spec, held, 0)
        got.append(float((latent - base).abs().mean()) / out[0].at(1.0))
        assert torch.equal(latent, plain_run(model, spec, held, applied[2]))
    mean = sum(asked) / len(asked)
    residual = sum((a - b) ** 2 for a, b in zip(got, asked, strict=True))
    assert 1 - residual / sum((b - mean) ** 2 for b in asked) >= 0.99


def test_a_lora_that_does_nothing(loras):  # noqa: F811
    held = {k: v * 0 for k, v in tensors("flux", "core").items()}
    with pytest.raises(ValueError, match="does not change this job"):
        calibrated("flux", loras("a.safetensors", held), strengths="0, 1")


def test_a_schedule_without_steps(loras):  # noqa: F811
    name = loras("a.safetensors", tensors("flux", "core"))
    with pytest.raises(ValueError, match="at least 2 sigmas, got 1"):
        calibrated("flux", name, sigmas=torch.zeros(1))
