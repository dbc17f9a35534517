"""Load OLSS: the file that the pack carries, and one of the user's own in its place."""

import pytest
import torch
from nodes_helper import run_node

import folder_paths  # isort: skip

from tessera.methods.sampling.olss import Table
from tessera.methods.sampling.olss_files import load, save
from tessera.nodes.sampling import load_olss
from tessera.nodes.sampling.load_olss import LoadOlss

CARRIED = "digits_image_8.safetensors"


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    return tmp_path / "tessera_olss"


def test_the_carried_one_is_for_the_digits(output):
    sampler, sigmas, about = run_node(LoadOlss, file=CARRIED)
    assert len(sigmas) == 9 and sigmas[0] == 1 and sigmas[-1] == 0 and sampler.sampler_function.table.steps == 8
    assert "cfg 2" in about and "latent 16x32x32" in about


def test_a_file_is_read_as_it_was_written_and_goes_first(output):
    table = Table(
        torch.tensor([1.0, 0.3, 0.0]).double(), torch.rand(2).double(), torch.rand(2, 2).double().tril(), {"cfg": "7"}
    )
    before = LoadOlss.fingerprint_inputs(file=CARRIED)
    back = load(save(output, CARRIED, table))
    assert back.about == table.about
    assert all(torch.equal(getattr(back, k), getattr(table, k)) for k in ("sigmas", "a", "b"))
    assert len(run_node(LoadOlss, file=CARRIED)[1]) == 3 and LoadOlss.fingerprint_inputs(file=CARRIED) != before
    assert load_olss.shelf().names() == [CARRIED]
