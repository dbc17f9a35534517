"""The calibration: its closed form, what it captures, and that its weights help in the node."""

import comfy.model_management
import comfy.samplers
import folder_paths
import pytest
import torch
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from nodes_helper import Job, error, facts, model_of, run_node
from sparse_linear_helper import call_of, explicit, projections
from tiny_models import empty_latent

from tessera.methods.attention.sparse_linear import SparseLinear
from tessera.methods.attention.sparse_linear_fit import Normal, Recorder
from tessera.methods.attention.sparse_linear_weights import read
from tessera.nodes.attention.sparse_linear_attention import SparseLinearAttention
from tessera.nodes.surgery.calibrate_sparse_linear_attention import CalibrateSparseLinearAttention
from tessera.patching.sparse_linear import captured_steps

NAME = "Sparse-Linear Attention"
CASE = ((1, 16, 20), 0, 0, 4)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "model_patches", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


def test_the_fit_is_ridge_regression():
    x, s, o = torch.randn(3, 2, 3, 700, 5).double()
    normal = Normal.empty(5)
    for part in range(2):
        normal.add(x[part : part + 1], s[part : part + 1], o[part : part + 1])
    weight, bias = normal.solve(0.1)
    rows, left = x.reshape(-1, 5), (o - s).reshape(-1, 5)
    scale = rows.square().sum(0).mean()
    centred, target = rows - rows.mean(0), left - left.mean(0)
    want = torch.linalg.solve(centred.T @ centred + 0.1 * scale * torch.eye(5).double(), centred.T @ target).T
    assert torch.allclose(weight, want) and torch.allclose(bias, left.mean(0) - want @ rows.mean(0))
    after = (left - rows @ weight.T - bias).norm() / o.norm()
    assert normal.error(weight, bias) == pytest.approx(float(after)) and normal.rows == 4200 and normal.calls == 2
    assert (
        normal.error() == pytest.approx(float(left.norm() / o.norm())) and normal.error(weight, bias) < normal.error()
    )


def test_what_the_branch_explains_is_found(error):
    """Outputs that are sparse plus a projection of the linear branch give that projection back."""
    x, s = torch.randn(2, 2, 4, 3000, 8)
    weight, bias = projections(8).blocks[3]
    normal = Normal.empty(8)
    normal.add(x, s, s + torch.nn.functional.linear(x, weight, bias))
    got = normal.solve(0.0)
    assert error(got[0], weight.double()) < 1e-5 and error(got[1], bias.double()) < 1e-5 and normal.error(*got) < 1e-4


def test_nothing_to_learn_from_gives_nothing():
    normal = Normal.empty(4)
    normal.add(torch.zeros(1, 1, 9, 4), torch.ones(1, 1, 9, 4), torch.ones(1, 1, 9, 4))
    weight, bias = normal.solve(1e-3)
    assert not weight.any() and not bias.any() and normal.error(weight, bias) == 0


@pytest.mark.parametrize("variant", ["main", "sla1", "paper"])
@pytest.mark.parametrize("case", [CASE, ((2, 9, 15), 7, 20, 2)], ids=str)
def test_captured_calls_are_answered_densely_and_fit_better(case, variant, error):
    import dataclasses
    from types import SimpleNamespace

    recorder = Recorder(SparseLinear(0.3, variant))
    state = recorder.begin()
    run = SimpleNamespace(run=SimpleNamespace(clock=SimpleNamespace(step=0)))
    call = dataclasses.replace(call_of(case), forward=run)
    out = recorder.attend(state, call).out
    dense = torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v, scale=0.25, enable_gqa=True)
    assert error(out, dense) < 1e-12
    blocks, (told,) = recorder.fitted(1e-3)
    assert told["block"] == 3 and 0 < told["after"] < told["before"]
    image = call.layout.image
    for key, projection in (("before", None), ("after", blocks[3])):
        got = explicit(recorder.method, call, projection)
        assert error(got[:, :, image], dense[:, :, image]) == pytest.approx(told[key], abs=1e-6), key


def test_captured_steps_are_spread_evenly():
    assert captured_steps(5, 64) == {0, 1, 2, 3, 4} and captured_steps(9, 3) == {0, 4, 8}
    assert captured_steps(7, 1) == {0} and len(captured_steps(100, 40)) == 40


def calibrate(model, spec, latent, steps=4, **inputs):
    from tiny_models import conds

    positive, negative = conds(spec) if spec else (None, None)
    sampling = model.get_model_object("model_sampling")
    inputs = {
        "positive": positive, "negative": negative, "latent": {"samples": latent}, "cfg": 3.0, "min_tokens": 0,
        "noise": Noise_RandomNoise(7), "sampler": comfy.samplers.sampler_object("euler"), "topk": 0.3,
        "sigmas": comfy.samplers.calculate_sigmas(sampling, "simple", steps), **inputs,
    }  # fmt: skip
    return run_node(CalibrateSparseLinearAttention, model=model, **inputs)


def large(spec):
    latent = empty_latent(spec)
    frames = [*latent.shape[2:-2]]
    return latent.new_zeros(*latent.shape[:2], *frames, *((30, 32) if frames in ([], [1]) else (18, 14)))


@pytest.mark.parametrize("variant", ["main", "sla1", "paper"])
@pytest.mark.parametrize("name", ["flux", "wan_meta", "sd3"])
def test_calibrated_weights_load_and_bring_the_run_closer(name, variant, folder):
    model, spec = model_of(name)
    latent = large(spec)
    out = calibrate(model, spec, latent, variant=variant)
    patched, path, report = out
    assert out.ui == {"tessera_report": [report]} and path == str(folder / "sparse_linear_00001.safetensors")
    rows = report["calibration"]["blocks"]
    assert rows and all(0 < row["after"] < row["before"] for row in rows)
    job = Job(spec, steps=4, latent=latent)
    settings = {"model": model, "topk": 0.3, "variant": variant, "min_tokens": 0}
    loaded = run_node(SparseLinearAttention, **settings, weights="sparse_linear_00001.safetensors")[0]
    plain, with_weights = job(model), job(loaded)
    assert torch.equal(job(patched), with_weights), "the MODEL of the calibration is that of the file"
    alone = job(run_node(SparseLinearAttention, **settings)[0])
    assert error(with_weights, plain) < error(alone, plain)
    tried = report["calibration"]
    assert tried["latent_error_sparse"] == pytest.approx(error(alone, plain), abs=2e-6)
    assert tried["latent_error"] == pytest.approx(error(with_weights, plain), abs=2e-6)
    assert report["notes"][0].startswith("error of the final latent") and len(report["notes"]) == 2 + len(rows)
    assert facts(loaded, NAME)["served"] == facts(loaded, NAME)["calls"]


def test_the_file_is_bound_to_its_model(folder):
    model, spec = model_of("flux")
    path = calibrate(model, spec, large(spec), steps=1, blocks="1-2", filename="mine")[1]
    made = read(path)
    assert list(made.blocks) == [1, 2] and made.model["architecture"] == "Flux" and made.model["blocks"] == 4
    other, _ = model_of("sd3")
    with pytest.raises(ValueError, match="fitted on Flux with 4 blocks"):
        run_node(SparseLinearAttention, model=other, weights="mine_00001.safetensors")
    with pytest.raises(ValueError, match="was made for variant main"):
        run_node(SparseLinearAttention, model=model, weights="mine_00001.safetensors", variant="sla1")
    second = calibrate(model, spec, large(spec), steps=1, filename="mine.safetensors")[1]
    assert second.endswith("mine_00002.safetensors"), "nothing is overwritten"


def test_the_run_is_dense_and_only_chosen_steps_are_captured(folder):
    model, spec = model_of("flux")
    report = calibrate(model, spec, large(spec), steps=6, captures=2, cfg=1.0)[2]
    told = next(f for f in report["features"] if f["name"] == "Calibrate Sparse-Linear Attention")["facts"]
    assert told["declined"] == {"not a captured step": 16} and told["served"] == 8 and told["pairs_fraction"] == 1
    assert [row["calls"] for row in report["calibration"]["blocks"]] == [2] * 4


def test_a_fit_that_does_not_help_says_so(folder, monkeypatch):
    model, spec = model_of("flux")
    monkeypatch.setattr(Normal, "solve", lambda self, ridge: (5 * torch.eye(128), torch.ones(128)))
    report = calibrate(model, spec, large(spec), steps=2)[2]
    assert "does not bring this job closer" in report["notes"][1]
    assert report["calibration"]["latent_error"] > report["calibration"]["latent_error_sparse"]
    assert calibrate(model, spec, large(spec), steps=2, verify=False)[2]["calibration"]["latent_error"] is None


def test_an_interrupt_writes_nothing(folder, monkeypatch):
    model, spec = model_of("flux")

    def interrupted():
        raise comfy.model_management.InterruptProcessingException()

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupted)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        calibrate(model, spec, large(spec))
    monkeypatch.undo()
    assert not [*folder.iterdir()]


def test_what_cannot_be_calibrated_says_so(folder):
    model, spec = model_of("flux")
    with pytest.raises(ValueError, match="captured nothing: fewer than 4096 image tokens"):
        calibrate(model, spec, large(spec), steps=1, min_tokens=4096)
    with pytest.raises(ValueError, match="captured nothing: every block is kept"):
        calibrate(model, spec, large(spec), steps=1, topk=1.0)
    with pytest.raises(ValueError, match="at least 2 sigmas, got 1"):
        calibrate(model, spec, large(spec), sigmas=torch.tensor([1.0]))
    for name in ("", "a/b", "..", ".hidden", "a\\b", "x" * 101, "a..b"):
        with pytest.raises(ValueError, match="without a folder"):
            calibrate(model, spec, large(spec), steps=1, filename=name)
    with pytest.raises(ValueError, match="a set without places"):
        other, spec = model_of("hunyuan3d2")
        calibrate(other, spec, empty_latent(spec), steps=1)
    assert not [*folder.iterdir()]


def test_a_trained_model_comes_closer_on_noise_that_it_has_not_seen(folder):
    """The digit FLUX at four times the area of its training: 1,024 tokens, 16 blocks."""
    import comfy.sd
    from pack import ROOT

    from tessera.methods.digits import words

    model = comfy.sd.load_diffusion_model(str(ROOT / "models/digits_flux.safetensors"))
    tokens, pooled = words.encode(torch.tensor([words.parse("five"), words.parse("")]))
    positive, negative = [[tokens[i : i + 1], {"pooled_output": pooled[i : i + 1]}] for i in range(2)]
    latent = torch.zeros(1, 16, 64, 64)
    job = {"positive": [positive], "negative": [negative]}
    blocks = {"block_q": "64", "block_k": "64", "order": "tiles", "variant": "sla1"}
    patched, _, report = calibrate(model, None, latent, steps=6, cfg=1.0, verify=False, **blocks, **job)
    assert all(row["after"] < row["before"] for row in report["calibration"]["blocks"])
    fresh = Job(model_of("flux")[1], steps=6, cfg=1.0, latent=latent, seed=21, **job)
    sparse = run_node(SparseLinearAttention, model=model, topk=0.3, min_tokens=0, **blocks)[0]
    plain, alone, fitted = (fresh(m) for m in (model, sparse, patched))
    assert error(fitted, plain) < error(alone, plain)
