"""Safetensors files: every damage that peers let through is one sentence with the file's name, and the tensor's."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from tessera.methods.files import header as m
from tessera.methods.files.finite import check_scales, is_scale
from tessera.methods.files.place import Mapped
from tessera.methods.files.safetensors_file import SafetensorsFile


def made(tensors: dict | str | bytes, body: int | bytes = 0, length: int | None = None) -> bytes:
    """A file from its header and its body (or that many bytes)."""
    raw = (
        tensors
        if isinstance(tensors, bytes)
        else (tensors if isinstance(tensors, str) else json.dumps(tensors)).encode()
    )
    return (
        struct.pack("<Q", len(raw) if length is None else length) + raw + (bytes(body) if type(body) is int else body)
    )


def one(dtype="F32", shape=(2, 3), offsets=(0, 24), **more) -> dict:
    return {"dtype": dtype, "shape": [*shape], "data_offsets": [*offsets], **more}


DEEP = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
CASES = {
    "empty": (b"", "it has 0 bytes, an incomplete download"),
    "seven bytes": (b"1234567", "it has 7 bytes"),
    "length 2^63": (made("{}", length=1 << 63), "its header is said to take 9,223,372,036,854,775,808 bytes, at most"),
    "length over the cap": (made("{}", length=100_000_001), "100,000,001 bytes, at most 100,000,000"),
    "length past the end": (made("{}", length=3), "3 bytes and the file has 10: an incomplete download"),
    "not UTF-8": (made(b'{"\xff":1}'), "its header is not UTF-8"),
    "not JSON": (made("{'a': 1}"), "its header is not JSON"),
    "a list": (made("[]"), "its header is a list"),
    "deep": (made(DEEP), "its header nests deeper"),
    "NaN": (made('{"a": NaN}'), "holds the number NaN"),
    "fraction": (made({"a": one(shape=(2, 3.0))}, 24), "holds the number 3.0"),
    "digits": (made('{"a": ' + "9" * 5000 + "}"), "its header is not JSON"),
    "twice": (made('{"a": 1, "a": 2}'), "its header lists a twice"),
    "field twice": (made('{"a": {"dtype": "F32", "dtype": "F16"}}'), "its header lists dtype twice"),
    "many values": (made('{"a": [' + "1," * 4_000_001 + "1]}"), "its header holds 4,000,003 values"),
    "metadata no object": (made({"__metadata__": [1]}), "its __metadata__ is a list"),
    "metadata no text": (made({"__metadata__": {"a": 1}}), "its metadata a is a int and not text"),
    "many tensors": (
        made({f"t{i}": one(shape=(0,), offsets=(0, 0)) for i in range(65_537)}),
        "it lists 65,537 tensors",
    ),
    "no object": (made({"a": 3}), "tensor a needs dtype, shape and data_offsets, and has int"),
    "field missing": (made({"a": {"dtype": "F32", "shape": []}}), "tensor a needs .* has dtype, shape"),
    "field unknown": (made({"a": one(more=1)}, 24), "tensor a needs .* has data_offsets, dtype, more, shape"),
    "dtype": (made({"a": one("F7")}, 24), "tensor a has the type 'F7'; known are BOOL, U8"),
    "dtype no text": (made({"a": one(["F32"])}, 24), "tensor a has the type"),
    "four bits": (made({"a": one("F4")}, 24), "tensor a has the type 'F4'"),
    "negative size": (made({"a": one(shape=(-2, -3))}, 24), r"tensor a has the shape \[-2, -3\]"),
    "size true": (made({"a": one(shape=(True,), offsets=(0, 4))}, 4), "tensor a has the shape"),
    "size text": (made({"a": one(shape=("2",), offsets=(0, 8))}, 8), "tensor a has the shape"),
    "overflow": (made({"a": one(shape=(1 << 32, 1 << 32), offsets=(0, 0))}), "tensor a .* is larger than any file"),
    "wraps around": (made({"a": one("F32", (1 << 62, 4), (0, 0))}), "tensor a .* is larger than any file"),
    "offsets": (made({"a": one(offsets=(0, 24, 3))}, 24), "tensor a has the data_offsets"),
    "offsets back": (made({"a": one(offsets=(24, 0))}, 24), r"tensor a has the data_offsets \[24, 0\]"),
    "offset negative": (made({"a": one(offsets=(-24, 0))}, 24), "tensor a has the data_offsets"),
    "bytes": (made({"a": one(shape=(2, 4))}, 24), r"tensor a F32 \[2, 4\] takes 32 bytes and is given 24"),
    "truncated": (made({"a": one()}, 23), "tensor a ends 1 bytes after the end of the file: an incomplete download"),
    "trailing": (made({"a": one()}, 25), "1 bytes follow tensor a and belong to no tensor"),
    "hole": (made({"a": one(), "b": one(offsets=(28, 52))}, 52), "4 bytes between tensor a and tensor b"),
    "hole before": (made({"a": one(offsets=(4, 28))}, 28), "4 bytes between the header and tensor a"),
    "overlap": (made({"a": one(), "b": one(offsets=(20, 44))}, 44), "tensor b overlaps tensor a by 4 bytes"),
    "the same bytes": (made({"a": one(), "b": one()}, 24), "tensor b overlaps tensor a by 24 bytes"),
    "zip": (b"PK\x03\x04\x14\0\0\0\x08\x08" + bytes(60), "zip archive .*convert_checkpoint"),
    "pickle": (b"\x80\x02}q\0(X\x04" + bytes(60), "it is a pickle .*convert_checkpoint"),
    "page": (b"\n<html><body>not found</body>", "it is a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of Git LFS"),
    "gguf": (b"GGUF" + bytes(60), "it is a GGUF file"),
}


@pytest.mark.parametrize("case", CASES)
def test_damage_is_named(tmp_path, case):
    content, sentence = CASES[case]
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"^w.safetensors cannot be read: .*{sentence}") as told:
        m.read_header(tmp_path / "w.safetensors")
    assert "\n" not in str(told.value) and len(str(told.value)) < 450


def test_names_are_shown_safely(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(made({"a\n\x1b[31m" + "x" * 500: one("F7")}, 24))
    with pytest.raises(ValueError) as told:
        m.read_header(tmp_path / "w.safetensors")
    assert str(told.value).isprintable() and len(str(told.value)) < 450


def test_whole_files(tmp_path):
    """What the library safetensors writes: every dtype, empty and scalar tensors, metadata; views, not copies."""
    kinds = [kind for kind in m.DTYPES.values() if kind not in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)]
    tensors = {
        str(kind)[6:]: (torch.arange(12) % 2).to(kind).view(3, 4) for kind in kinds if kind != torch.float8_e8m0fnu
    }
    tensors |= {"none": torch.zeros(0, 4), "scalar": torch.tensor(3.5)}
    save_file(tensors, tmp_path / "w.safetensors", {"format": "pt", "ünï": "çödé"})
    file = SafetensorsFile(tmp_path / "w.safetensors")
    assert file.metadata == {"format": "pt", "ünï": "çödé"} and set(file) == set(tensors) and file.warnings == []
    for name, tensor in tensors.items():
        got = file[name]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(got.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    assert file["float32"].data_ptr() == file["float32"].data_ptr()
    before = (tmp_path / "w.safetensors").read_bytes()
    file["float32"].zero_()
    assert (tmp_path / "w.safetensors").read_bytes() == before


def test_tensors_that_lie_at_odd_places(tmp_path):
    """A header of odd length: tensors are the same, only copied."""
    body = torch.arange(6.0).view(torch.uint8).numpy().tobytes()
    raw = json.dumps({"a": one()})
    for pad in range(4):
        (tmp_path / "w.safetensors").write_bytes(made(raw + " " * pad, body))
        assert torch.equal(SafetensorsFile(tmp_path / "w.safetensors")["a"], torch.arange(6.0).view(2, 3))


def test_files_that_cannot_be_opened(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(ValueError, match="^w.safetensors cannot be read: Permission denied"):
        m.read_header(path)


def test_truth_values_of_any_byte(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(made({"a": one("BOOL", (4,), (0, 4))}, bytes([0, 1, 2, 255])))
    got = SafetensorsFile(tmp_path / "w.safetensors")["a"]
    assert got.view(torch.uint8).tolist() == [0, 1, 1, 1]


def test_a_file_that_is_replaced(tmp_path):
    """Between header and load, and between opening and a tensor: refused, whatever the new file is."""
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    header, file = m.read_header(path), SafetensorsFile(path)
    other = tmp_path / "other"
    save_file({"a": torch.ones(2)}, other)
    os.replace(other, path)
    for act in (header.map, lambda: file["a"], lambda: Mapped(path, header.stamp)):
        with pytest.raises(ValueError, match="w.safetensors cannot be read: it was replaced or written while"):
            act()
    path.unlink()
    with pytest.raises(ValueError, match="w.safetensors cannot be read: No such file"):
        file["a"]


def test_places(tmp_path):
    models, outside = tmp_path / "models", tmp_path / "outside"
    models.mkdir(), outside.mkdir(), (tmp_path / "models-2").mkdir()
    save_file({"a": torch.zeros(2)}, models / "in.safetensors")
    for folder in (outside, tmp_path / "models-2"):
        save_file({"a": torch.zeros(2)}, folder / "out.safetensors")
    (models / "link.safetensors").symlink_to(outside / "out.safetensors")
    (models / "inner.safetensors").symlink_to(models / "in.safetensors")
    for name in ("in.safetensors", "inner.safetensors"):
        assert [*m.read_header(models / name, [models]).tensors] == ["a"]
    assert [*m.read_header(models / "link.safetensors", [models, outside]).tensors] == ["a"]
    assert [*m.read_header(models / "link.safetensors").tensors] == ["a"]
    for path in (
        models / "link.safetensors",
        models / "../outside/out.safetensors",
        tmp_path / "models-2/out.safetensors",
    ):
        with pytest.raises(ValueError, match="it lies outside of ComfyUI's model folders"):
            m.read_header(path, [models])
    for path, sentence in ((models, "it is no ordinary file"), (models / "no", "No such file"), ("a\0b", "null")):
        with pytest.raises(ValueError, match=f"cannot be read: .*{sentence}"):
            m.read_header(path)


@pytest.mark.parametrize(
    "name",
    [
        "a.weight_scale",
        "a.weight_scale_2",
        "a.input_scale",
        "a.wscales",
        "a.wzeros",
        "a.smooth",
        "a.smooth_factor",
        "scale",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_scales_that_are_not_finite(tmp_path, name, dtype):
    tensor = torch.ones(300, 100)
    tensor[-1, -7] = float("nan")
    save_file({name: tensor.to(dtype), "a.weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=rf"^w.safetensors cannot be read: the scales {name} \[300, 100\] are not all"):
        SafetensorsFile(tmp_path / "w.safetensors")
    check_scales("w", name, torch.ones(3).to(dtype))


def test_weights_that_are_not_finite_are_told(tmp_path):
    """By sample, the first and the last elements among it; scales are known by their names alone."""
    tensors = {f"{i}.weight": torch.zeros(100_000) for i in range(6)}
    for i in range(5):
        tensors[f"{i}.weight"][-1 if i % 2 else 0] = float("inf")
    save_file(tensors, tmp_path / "w.safetensors")
    (told,) = SafetensorsFile(tmp_path / "w.safetensors").warnings
    assert told.startswith("Not all weights are finite: 0.weight, 1.weight, 2.weight and 2 more.")
    for name in ("a.weight", "scaled", "a.scale_shift_table", "upscale.weight", "a.norm_q.weight"):
        assert not is_scale(name)
