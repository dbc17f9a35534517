"""Calibrate Quantization records a plain run, and Quantize Model takes what it saw."""

import pytest
import torch
from calibration_helper import job_of
from nodes_helper import Job, model_of, run_node
from quantized_helper import LAYER, folder, loaded, quantized  # noqa: F401 - a fixture

import comfy.model_management  # isort: skip
import folder_paths  # isort: skip

from tessera.nodes.loaders.calibrate_quantization import CalibrateQuantization
from tessera.nodes.loaders.load_calibration import LoadCalibration
from tessera.nodes.loaders.quantize_model import QuantizeModel

pytestmark = pytest.mark.usefixtures("folder")


def short(spec, **more):
    return Job(spec, **{"steps": 2, "cfg": 1.0, **more})


def test_a_calibration_is_recorded_saved_and_used(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    model, spec = model_of("flux")
    out = run_node(CalibrateQuantization, **job_of(model, spec, steps=3), model=model, rows=32, filename="mine")
    found, latent = out[0], out[1]
    assert torch.equal(latent["samples"], Job(spec, steps=3, seed=7)(model)), "the run is the plain one"
    assert not model.model.diffusion_model.double_blocks[0].img_mlp[0]._forward_pre_hooks
    again, about = run_node(LoadCalibration, calibration="mine.safetensors")
    assert about.startswith("20 layers") and again.layers.keys() == found.layers.keys()
    _, made, _, _ = quantized("flux", "int4_g64", activations="int4", rotation="zigzag_hadamard", calibration=again)
    assert made.get_model_object(f"diffusion_model.{LAYER['flux']}.weight")._params.permutation is not None
    assert torch.equal(short(spec)(loaded("flux.safetensors")), short(spec)(made))
    with pytest.raises(ValueError, match="connect a calibration"):
        quantized("flux", "int4_g64", rotation="zigzag_hadamard")
    other, _ = model_of("wan_meta")
    with pytest.raises(ValueError, match="calibration"):
        run_node(QuantizeModel, model=other, filename="other", calibration=again)


def test_an_interrupt_leaves_no_hook(monkeypatch):
    model, spec = model_of("flux")
    inside = model.model.diffusion_model
    inside.double_blocks[0].img_mlp[0].register_forward_pre_hook(
        lambda *_: comfy.model_management.interrupt_current_processing()
    )
    hooks = lambda: sum(len(m._forward_pre_hooks) for m in inside.modules())  # noqa: E731
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run_node(CalibrateQuantization, **job_of(model, spec, steps=3), model=model)
        assert hooks() == 1
    finally:
        inside.double_blocks[0].img_mlp[0]._forward_pre_hooks.clear()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_it_saw_are_the_inputs_of_the_layers(dtype):
    model, spec = model_of("wan_meta", dtype)
    seen: list[torch.Tensor] = []
    layer = model.model.diffusion_model.get_submodule(LAYER["wan_meta"])
    hook = layer.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().reshape(-1, args[0].shape[-1]).float())
    )
    try:
        found = run_node(CalibrateQuantization, **job_of(model, spec, steps=3), model=model, rows=16)[0]
    finally:
        hook.remove()
    whole, kept = torch.cat(seen), found.layers[LAYER["wan_meta"]]
    assert kept.count == len(whole) and torch.equal(kept.amax, whole.abs().amax(0))
    torch.testing.assert_close(kept.mean_square, whole.square().mean(0), rtol=1e-4, atol=1e-6)
    rows = whole.to(torch.bfloat16)
    assert len(kept.rows) == 16 and all((rows == row).all(1).any() for row in kept.rows)


def test_a_filename_is_checked_before_minutes_are_spent():
    model, spec = model_of("flux")
    with pytest.raises(ValueError, match="without a folder"):
        run_node(CalibrateQuantization, **job_of(model, spec, steps=3), model=model, filename="../x")
