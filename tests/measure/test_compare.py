"""Compare: two MODELs, the same job. Its numbers are checked against separate runs and forward hooks."""

import gc
import json

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from nodes_helper import Job, error, model_of, run_node, taylor, watching
from tiny_models import conds, empty_latent

from tessera.methods.digits import codec
from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.nodes.measure.compare import Compare
from tessera.patching.run import Run


def compare(model_a, model_b, spec, steps=6, **inputs):
    positive, negative = conds(spec)
    sampling = model_a.get_model_object("model_sampling")
    inputs = {
        "positive": positive, "negative": negative, "latent": {"samples": empty_latent(spec)}, "cfg": 3.0, "repeats": 1,
        "noise": Noise_RandomNoise(7), "sampler": comfy.samplers.sampler_object("euler"), "decode": "none",
        "sigmas": comfy.samplers.calculate_sigmas(sampling, "simple", steps), **inputs,
    }  # fmt: skip
    return run_node(Compare, model_a=model_a, model_b=model_b, **inputs)


@pytest.mark.parametrize("name", ["flux", "wan_meta", "sd3", "ltxv_meta", "lumina2", "ltxav_meta"])
def test_a_model_beside_itself(name):
    model, spec = model_of(name)
    out = compare(model, model, spec, repeats=2)
    a, b, image, report, chart = out
    assert out.ui == {"tessera_report": [report]}
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["identical"] and report["latent_error"] == 0 and report["per_step_error"] == [0.0] * 6
    assert error(a["samples"], b["samples"]) == 0 and image.shape == (1, 1, 1, 3)
    assert error(a["samples"], Job(spec, steps=6)(model)) == 0
    for side in (report["a"], report["b"]):
        assert 0 < side["seconds"]["min"] <= side["seconds"]["median"] <= side["seconds"]["max"]
        assert (side["steps"], side["evaluations"], side["blocks_skipped"], side["features"]) == (6, 6, 0, [])
    assert chart.ndim == 4 and chart.min() >= 0 and chart.max() <= 1
    assert [p["name"] for p in report["points"]] == ["a", "b"]
    assert report["speedup"] > 0 and report["notes"] == ["timed 2 times each; 3 repeats or more give a steadier ratio"]


@pytest.mark.parametrize("level", ["last_block", "output"])
@pytest.mark.parametrize("name", ["flux", "wan_meta", "sd3", "lumina2"])
def test_counts_are_those_of_the_blocks(name, level):
    model, spec = model_of(name)
    fast = taylor(model, level=level)
    job = Job(spec, steps=6)
    with watching(model) as plain:
        want = job(model)
    with watching(model) as watch:
        got = job(fast)
    a, b, _, report, _ = compare(model, fast, spec)
    assert torch.equal(a["samples"], want) and torch.equal(b["samples"], got)
    assert report["a"]["blocks_computed"] == report["a"]["blocks_total"] == plain.blocks
    assert report["b"]["blocks_computed"] == watch.blocks
    assert report["b"]["blocks_skipped"] == plain.blocks - watch.blocks > 0
    assert report["b"]["blocks_total"] == plain.blocks
    assert not report["identical"] and report["latent_error"] == pytest.approx(error(got, want), abs=2e-6)
    assert report["per_step_error"][:2] == [0.0, 0.0] and report["per_step_error"][-1] > 0
    assert report["b"]["held_bytes"] > 0 and report["b"]["features"][0]["name"] == "Taylor Cache"


def test_pairs_of_attention():
    model, spec = model_of("wan_meta")
    cut = run_node(LocalWindowAttention, model=model, radius=2, min_tokens=0)[0]
    report = compare(model, cut, spec, steps=2)[3]
    facts = report["b"]["features"][0]["facts"]
    assert report["a"]["pairs_fraction"] == 1.0
    assert report["b"]["pairs_fraction"] == round(facts["pairs"] / facts["dense_pairs"], 6)
    assert report["b"]["blocks_computed"] == report["b"]["blocks_total"]


@pytest.mark.parametrize("name", ["flux", "wan_meta"])
def test_digits_are_decoded(name):
    model, spec = model_of(name)
    a, b, image, report, _ = compare(model, taylor(model), spec, decode="digits")
    frames = spec.latent[2] if len(spec.latent) == 5 else 1
    h, w = (4 * n for n in spec.latent[-2:])
    assert image.shape == (frames, h, 3 * w, 3) and image.min() >= 0 and image.max() <= 1
    pixels = codec.decode(a["samples"]).reshape(frames, h, w)
    assert torch.equal(image[:, :, :w, 0], pixels)
    assert 0 < report["psnr"] < 60 and 0 < report["ssim"] < 1
    same = compare(model, model, spec, decode="digits")[3]
    assert same["psnr"] is None and same["ssim"] == 1.0 and same["identical"]


def test_vae_is_used_or_asked_for():
    class Vae:
        def decode(self, samples):
            return samples[:, :3].movedim(1, -1).sigmoid()

    model, spec = model_of("flux")
    with pytest.raises(ValueError, match="decode is vae but no VAE is connected"):
        compare(model, model, spec, decode="vae")
    image = compare(model, model, spec, decode="vae", vae=Vae())[2]
    assert image.shape == (1, 8, 36, 3)


def test_latents_that_cannot_be_compared():
    flux, spec = model_of("flux")
    for other in ("wan_meta", "ltxv_meta", "sd3"):
        with pytest.raises(ValueError, match="Compare: MODEL a makes Flux latents of .* which cannot be compared"):
            compare(flux, model_of(other)[0], spec)
    with pytest.raises(ValueError, match="at least 2 sigmas, got 1"):
        compare(flux, flux, spec, sigmas=torch.tensor([1.0]))


def test_a_model_that_breaks_is_told():
    model, spec = model_of("flux")
    broken = model.clone()
    broken.set_model_unet_function_wrapper(lambda apply, args: torch.full_like(args["input"], float("nan")))
    report = compare(model, broken, spec, decode="digits")[3]
    json.dumps(report, allow_nan=False)
    assert report["latent_error"] is None and not report["identical"]
    assert "the latent of b has values that are not finite" in report["notes"]


class Interrupting(Noise_RandomNoise):
    """Presses Cancel when the third run (of four) makes its noise."""

    runs = 0

    def generate_noise(self, latent):
        self.runs += 1
        if self.runs == 3:
            comfy.model_management.interrupt_current_processing(True)
        return super().generate_noise(latent)


@pytest.mark.parametrize("name", ["flux", "lumina2"])
def test_cancel_propagates_and_leaves_nothing(name):
    model, spec = model_of(name)
    plain, fast = Job(spec)(model), taylor(model)
    noise = Interrupting(7)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        compare(model, fast, spec, noise=noise)
    assert noise.runs == 3
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is Run]
    assert torch.equal(Job(spec)(model), plain)
    assert compare(model, fast, spec)[3]["b"]["blocks_skipped"] > 0


def test_masks_and_further_keys_of_the_latent_stay():
    model, spec = model_of("flux")
    mask = torch.zeros(1, 1, 8, 12)
    mask[..., :6] = 1
    latent = {"samples": torch.randn(spec.latent), "noise_mask": mask, "batch_index": [0]}
    a, b, _, _, _ = compare(model, taylor(model), spec, latent=latent)
    for out in (a, b):
        assert out["noise_mask"] is mask and out["batch_index"] == [0]
        assert error(out["samples"][..., 6:], latent["samples"][..., 6:]) < 1e-5


def test_any_number_of_models(tmp_path, monkeypatch):
    model, spec = model_of("wan_meta")
    monkeypatch.setattr("folder_paths.get_output_directory", lambda: str(tmp_path))
    more = {"model_c": taylor(model, interval=2), "model_d": model}
    out = compare(
        model, taylor(model), spec, steps=9, more=more, labels="plain, =three", save_as="mine", decode="digits"
    )
    _, b, image, report, chart = out
    assert [side["label"] for side in report["models"]] == ["plain", "=three", "c", "d"]
    assert torch.equal(b["samples"], Job(spec, steps=9)(taylor(model)))
    assert report["models"][3]["identical"] and report["models"][3]["ssim"] == 1.0
    assert report["models"][1]["blocks_skipped"] > report["models"][2]["blocks_skipped"] > 0
    assert report["models"][1]["ssim"] == report["ssim"] and report["b"] == report["models"][1]
    frames, (h, w) = spec.latent[2], (4 * n for n in spec.latent[-2:])
    assert image.shape == (frames, 2 * h, 4 * w, 3) and chart.shape[0] == 1
    assert image[:, h:, :w].max() == 0 and image[:, h:, w : 2 * w].max() == 1
    whole, flat = (tmp_path / name for name in report["files"])
    assert json.loads(whole.read_text())["models"][2]["label"] == "c"
    rows = flat.read_text().splitlines()
    assert len(rows) == 5 and rows[0].startswith("label,seconds,speedup,ssim") and rows[2].startswith("'=three,")
    assert rows[0].endswith("error_step_9") and rows[4].endswith(",0.0" * 9)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"labels": "a, b, c"}, "3 labels for 2 MODELs"),
        ({"labels": "same, same"}, "same label among same, same"),
        ({"save_as": "../out"}, "file name"),
    ],
)
def test_labels_and_names_that_cannot_be(inputs, sentence):
    model, spec = model_of("flux")
    with pytest.raises(ValueError, match=sentence):
        compare(model, model, spec, **inputs)


def test_a_model_that_is_not_there():
    model, spec = model_of("flux")
    with pytest.raises(ValueError, match="no MODEL at model_b"):
        compare(model, None, spec)
