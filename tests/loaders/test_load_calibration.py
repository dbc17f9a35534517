"""Load Calibration: what the folder holds and what the pack carries, and nothing else."""

import pytest
import torch
from nodes_helper import run_node
from pack import ROOT

import comfy.sd  # isort: skip
import folder_paths  # isort: skip

from tessera.methods.quant.calibration import LayerStatistics, Statistics, save
from tessera.nodes.loaders.load_calibration import LoadCalibration
from tessera.patching.calibrate_quantization import FOLDER
from tessera.patching.sizes import fingerprint

CARRIED = "digits_image.safetensors"


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    return tmp_path / FOLDER


def small():
    layer = LayerStatistics(8, 4)
    layer.add(torch.randn(5, 8))
    return Statistics({"a": layer}, "model", 4, "sample_euler")


def test_what_is_offered_and_loaded(output):
    offered = lambda: LoadCalibration.define_schema().inputs[0].options  # noqa: E731
    assert offered() == [CARRIED]
    save(output / "mine.safetensors", small())
    (output / "notes.txt").write_text("none")
    assert offered() == [CARRIED, "mine.safetensors"]
    found, about = run_node(LoadCalibration, calibration="mine.safetensors")
    assert found.layers.keys() == {"a"} and about.startswith("1 layers, up to 5 tokens each, 4 steps")
    before = LoadCalibration.fingerprint_inputs("mine.safetensors")
    save(output / "mine.safetensors", small())
    assert LoadCalibration.fingerprint_inputs("mine.safetensors") != before


def test_the_carried_one_is_of_the_carried_model(output):
    found, _ = run_node(LoadCalibration, calibration=CARRIED)
    model = comfy.sd.load_diffusion_model(str(ROOT / "models/digits_flux.safetensors"))
    assert found.model == fingerprint(model.model.diffusion_model) and len(found.layers) == 14
    save(output / CARRIED, small())
    assert run_node(LoadCalibration, calibration=CARRIED)[0].layers.keys() == {"a"}, "the user's own goes first"


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "none.safetensors", ""])
def test_nothing_outside_is_read(output, name):
    save(output.parent / "outside.safetensors", small())
    LoadCalibration.fingerprint_inputs(name)
    with pytest.raises(ValueError, match="There is no calibration"):
        run_node(LoadCalibration, calibration=name)


def test_a_link_out_of_the_folder_is_not_offered(output):
    save(output.parent / "outside.safetensors", small())
    output.mkdir()
    (output / "link.safetensors").symlink_to(output.parent / "outside.safetensors")
    assert LoadCalibration.define_schema().inputs[0].options == [CARRIED]


def test_damage_is_named(output):
    save(output / "mine.safetensors", small())
    whole = (output / "mine.safetensors").read_bytes()
    (output / "mine.safetensors").write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="mine.safetensors"):
        run_node(LoadCalibration, calibration="mine.safetensors")
