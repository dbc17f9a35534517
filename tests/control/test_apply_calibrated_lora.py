"""A LoRA at an amount instead of a strength."""

import comfy.sd
import pytest
import torch
from lora_helper import loras, tensors  # noqa: F401 - a fixture
from nodes_helper import Job, model_of, run_node

from tessera.methods.control.lora_curve import Curve
from tessera.nodes.control.apply_calibrated_lora import ApplyCalibratedLora

CURVE = Curve("a.safetensors", "difference", (0.0, 0.5, 1.0, 1.5), (0.0, 0.8, 1.0, 1.1))


def applied(model, **inputs):
    return run_node(ApplyCalibratedLora, model=model, lora="a.safetensors", **inputs)


@pytest.mark.parametrize("amount", [0.0, 1.0])
def test_amounts_0_and_1_are_the_base_and_the_plain_lora(loras, amount):  # noqa: F811
    model, spec = model_of("sd3")
    held = tensors("sd3", "diffusers")
    loras("a.safetensors", held)
    got, clip, strength = applied(model, amount=amount, curve=CURVE).result
    want = comfy.sd.load_lora_for_models(model, None, held, 1.0, 0)[0] if amount else model
    job = Job(spec, steps=2)
    assert strength == amount and clip is None and torch.equal(job(got), job(want))


def test_an_amount_between_takes_the_strength_of_the_curve(loras):  # noqa: F811
    model = model_of("flux")[0]
    loras("a.safetensors", tensors("flux", "core"))
    got, _, strength = applied(model, amount=0.4, json=CURVE.to_json()).result
    assert CURVE.amount(strength) == pytest.approx(0.4, abs=1e-9) and 0 < strength < 0.4
    assert {p[0] for held in got.patches.values() for p in held} == {strength}


def test_beyond_the_curve_is_told(loras):  # noqa: F811
    model = model_of("flux")[0]
    loras("a.safetensors", tensors("flux", "core"))
    out = applied(model, amount=2.0, curve=CURVE)
    assert out[2] == pytest.approx(1.5) and "measure higher strengths" in out.ui["tessera_report"][0]["lines"][1]


def test_wrong_or_missing_curves(loras):  # noqa: F811
    model = model_of("flux")[0]
    loras("a.safetensors", tensors("flux", "core"))
    with pytest.raises(ValueError, match="needs a curve"):
        applied(model)
    with pytest.raises(ValueError, match="measured with b.safetensors, not with a.safetensors"):
        applied(model, curve=Curve("b.safetensors", "difference", (0.0, 1.0), (0.0, 1.0)))
