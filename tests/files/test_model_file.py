"""A model file by its ending: safetensors and GGUF are opened, pickles named to the converter."""

import pytest
import torch
from gguf_helper import Made
from safetensors.torch import save_file

from tessera.methods.files.gguf_file import GgufFile
from tessera.methods.files.model_file import open_model
from tessera.methods.files.safetensors_file import SafetensorsFile


def test_endings(tmp_path):
    for name in ("a.safetensors", "b.SFT"):
        save_file({"a": torch.ones(2)}, tmp_path / name)
        assert isinstance(open_model(str(tmp_path / name), [tmp_path]), SafetensorsFile)
    Made([], [("a", (2,), "F32", bytes(8))]).write(tmp_path / "a.gguf")
    assert isinstance(open_model(tmp_path / "a.gguf", [tmp_path]), GgufFile)
    for name, sentence in (
        ("a.pt", "may hold code; convert it with `python -m scripts.convert_checkpoint`"),
        ("a.CKPT", "may hold code"),
        ("a.txt", "models are read from .safetensors, .sft, .gguf files"),
    ):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match=f"^{name} cannot be read: .*{sentence}"):
            open_model(tmp_path / name)


def test_a_kind_under_another_ending(tmp_path):
    """Each says what the file is, and a file outside of the folders is refused under either ending."""
    save_file({"a": torch.ones(2)}, tmp_path / "a.gguf")
    Made([], [("a", (2,), "F32", bytes(8))]).write(tmp_path / "a.safetensors")
    for name, sentence in (("a.gguf", "it is a safetensors file"), ("a.safetensors", "it is a GGUF file")):
        with pytest.raises(ValueError, match=f"^{name} cannot be read: {sentence}"):
            open_model(tmp_path / name)
        with pytest.raises(ValueError, match="it lies outside"):
            open_model(tmp_path / name, [tmp_path / "models"])
