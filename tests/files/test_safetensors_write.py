"""Files that are written tensor by tensor are read by others, and are there whole or not at all."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tessera.methods.files.header import read_header
from tessera.methods.files.safetensors_write import NAMES, SafetensorsWriter


def test_others_read_it(tmp_path):
    file = tmp_path / "x.safetensors"
    wanted = {
        f"a.{name}": torch.arange(24).reshape(2, 3, 4).to(dtype) for dtype, name in NAMES.items() if name != "BOOL"
    }
    wanted |= {"empty": torch.zeros(0, 3), "one": torch.tensor(2.5), "strided": torch.arange(12.0).reshape(3, 4).T}
    with SafetensorsWriter(file, {"who": "a test"}, len(wanted)) as out:
        for name, tensor in wanted.items():
            out.add(name, tensor)
        with pytest.raises(ValueError, match="holds one already"):
            out.add("one", torch.ones(1))
    (tmp_path / "plain").touch()
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode, "others may read it"
    found = load_file(file)
    assert found.keys() == wanted.keys() and read_header(file).metadata == {"who": "a test"}
    for name, tensor in wanted.items():
        same = found[name].contiguous().reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape and torch.equal(*same)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_what_was_there_stays(tmp_path, stop):
    file = tmp_path / "x.safetensors"
    save_file({"old": torch.ones(2)}, file)
    with pytest.raises(stop), SafetensorsWriter(file, {}, 1) as out:
        out.add("new", torch.ones(3))
        raise stop
    assert load_file(file).keys() == {"old"} and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_more_than_was_told(tmp_path):
    with (
        pytest.raises(ValueError, match="more than were told of"),
        SafetensorsWriter(tmp_path / "x.safetensors", {}, 1) as out,
    ):
        for i in range(200):
            out.add(f"{i}" * 20, torch.ones(1))
    assert not list(tmp_path.iterdir())
