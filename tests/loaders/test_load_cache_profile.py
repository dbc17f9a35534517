"""Load Cache Profile: what the folder holds, and nothing else."""

import json

import pytest
from nodes_helper import model_of, run_node, taylor
from pack import ROOT

import comfy.sd  # isort: skip
import folder_paths  # isort: skip

from tessera.methods.cache.profile import Profile
from tessera.methods.cache.profile_files import FOLDER, save
from tessera.nodes.loaders.load_cache_profile import LoadCacheProfile
from tessera.patching.sizes import fingerprint

CARRIED_FILE = "digits_image_taylor.json"
PROFILE = Profile("Taylor Cache", {"interval": 4}, "", "sample_euler", 20, {"error": 0.05, "spread": None})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    return tmp_path / FOLDER


def test_files_of_the_folder_and_those_of_the_pack_are_offered(folder):
    offered = lambda: LoadCacheProfile.define_schema().inputs[0].options  # noqa: E731
    assert offered() == [CARRIED_FILE]
    save(folder, "b", PROFILE)
    save(folder, "a", PROFILE)
    (folder / "notes.txt").write_text("no profile")
    assert offered() == ["a.json", "b.json", CARRIED_FILE]


def test_what_the_pack_carries_is_for_its_own_model_and_steps_aside_for_the_users(folder):
    found, about = run_node(LoadCacheProfile, profile=CARRIED_FILE)
    model = comfy.sd.load_diffusion_model(str(ROOT / "models" / "digits_flux.safetensors"))
    assert found.model == fingerprint(model.model.diffusion_model) and "20 steps" in about
    save(folder, CARRIED_FILE, PROFILE)
    assert run_node(LoadCacheProfile, profile=CARRIED_FILE)[0] == PROFILE


def test_it_loads_and_tells(folder):
    save(folder, "mine", PROFILE)
    found, about = run_node(LoadCacheProfile, profile="mine.json")
    assert found == PROFILE and about == "Taylor Cache: euler, 20 steps; error 0.05"
    before = LoadCacheProfile.fingerprint_inputs("mine.json")
    save(folder, "mine", Profile("Taylor Cache", {"interval": 5}))
    assert LoadCacheProfile.fingerprint_inputs("mine.json") != before  # a changed file is read again


@pytest.mark.parametrize("name", ["../outside.json", "/etc/passwd", "none.json", ""])
def test_nothing_outside_is_read(folder, name):
    folder.mkdir()
    (folder.parent / "outside.json").write_text(PROFILE.to_json())
    LoadCacheProfile.fingerprint_inputs(name)
    with pytest.raises(ValueError, match="without a folder|There is no profile"):
        run_node(LoadCacheProfile, profile=name)


def test_what_is_no_profile(folder):
    folder.mkdir()
    (folder / "broken.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ValueError, match="This is no cache profile"):
        run_node(LoadCacheProfile, profile="broken.json")
    with pytest.raises(ValueError, match="This is no cache schedule"):
        taylor(model_of("flux")[0], profile=Profile("Taylor Cache", {"schedule": {"format": "x"}}))
