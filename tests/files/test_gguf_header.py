"""GGUF files that are damaged, one case of each kind: one sentence with the file's name, and the tensor's."""

import struct

import pytest
from gguf_helper import Made

from tessera.methods.files.gguf_header import read_gguf_header

F16 = bytes(range(64))
TWO = [("a.weight", (4, 8), "F16", F16), ("b", (32,), "F16", F16)]


def made(**change) -> bytes:
    return Made(**({"metadata": [("general.architecture", 8, "wan")], "tensors": TWO} | change)).bytes()


CASES = {
    "empty": (b"", r"its header ends after the end of the file of 0 bytes: an incomplete download"),
    "short": (made()[:20], "incomplete download"),
    "magic": (made(magic=b"GGUX"), "does not begin with GGUF"),
    "safetensors": (struct.pack("<Q", 100) + b'{"a":1}' + bytes(80), "it is a safetensors file"),
    "page": (b"<!DOCTYPE html><html>", "it is a web page"),
    "version": (made(version=1), "it is GGUF version 1, and versions 2 and 3 are read"),
    "big-endian": (made(version=3 << 24), "it is big-endian"),
    "tensors": (made(counts=(1 << 40, None)), r"it is said to hold 1,099,511,627,776 tensors, at most 65,536"),
    "more tensors": (made(counts=(60_000, None)), r"60,000 tensors, at most 65,536 are read, in its \d+ bytes"),
    "entries": (made(counts=(None, 1 << 63)), "entries of metadata, at most 65,536"),
    "one entry more": (made(counts=(None, 2)), "a tensor's name is said to have"),
    "length of a name": (made(metadata=[(b"x" * 70_000, 4, 1)]), "a name in its metadata is said to have 70,000 bytes"),
    "not text": (made(metadata=[(b"\xff\xfe", 4, 1)]), "a name in its metadata is not UTF-8"),
    "key twice": (made(metadata=[("x", 4, 1), ("x", 4, 2)]), "its metadata lists x twice"),
    "truth": (made(metadata=[("x", 7, 2)]), "its metadata x is the truth value 2"),
    "alignment 0": (made(metadata=[("general.alignment", 4, 0)]), "its alignment is 0 and not a power of two"),
    "alignment 24": (made(metadata=[("general.alignment", 4, 24)]), "its alignment is 24"),
    "alignment text": (made(metadata=[("general.alignment", 8, "32")]), "its alignment is 32 and not a power"),
    "dimensions": (made(dims={"b": (1,) * 9}), "tensor b is said to have 9 dimensions"),
    "size 0": (made(dims={"b": (0, 32)}), r"tensor b has the shape \[32, 0\]"),
    "overflow": (made(dims={"b": (1 << 32, 1 << 32)}), "tensor b has the shape"),
    "too large": (made(dims={"b": (1 << 20, 1 << 20)}), "tensor b ends .* after the end of the file: an incomplete"),
    "type": (made(types={"b": 3}), "tensor b has the type Q4_1; read are F32, F16, BF16, Q4_0"),
    "IQ": (made(types={"b": 22}), "tensor b has the type IQ2_S"),
    "no type": (made(types={"b": 999}), "tensor b has the type number 999"),
    "blocks": (made(types={"a.weight": 2}), r"tensor a.weight Q4_0 \[4, 8\] does not divide into blocks of 32 columns"),
    "misaligned": (made(offsets={"b": 65}), "tensor b begins at 65, and its data is aligned to 32"),
    "overlap": (made(offsets={"b": 32}), "tensor b overlaps tensor a.weight by 32 bytes"),
    "hole": (made(offsets={"b": 96}), "32 bytes between tensor a.weight and tensor b belong to none"),
    "far away": (made(offsets={"b": 1 << 62}), "belong to none"),
    "truncated": (made()[:-3], "tensor b ends 3 bytes after the end of the file: an incomplete download"),
    "trailing": (made() + b"x", "1 bytes follow tensor b and belong to no tensor"),
    "name twice": (made(tensors=[TWO[0], TWO[0]]), "lists tensor a.weight twice"),
}


@pytest.mark.parametrize("case", CASES)
def test_damage_is_named(tmp_path, case):
    content, sentence = CASES[case]
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=f"^a.gguf cannot be read: .*({sentence})") as told:
        read_gguf_header(tmp_path / "a.gguf")
    assert "\n" not in str(told.value) and len(str(told.value)) < 400


def test_array_that_is_too_long(tmp_path):
    """An array that claims more elements than the file has bytes is refused before it is read."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"x" + struct.pack("<IIQ", 9, 8, 1 << 61)
    for content in (head, head[:-12] + struct.pack("<IQ", 10, 1 << 40), head[:-12] + struct.pack("<IQ", 9, 1)):
        (tmp_path / "a.gguf").write_bytes(content + bytes(64))
        with pytest.raises(ValueError, match="a.gguf cannot be read: its metadata x"):
            read_gguf_header(tmp_path / "a.gguf")


def test_a_whole_file(tmp_path):
    for content in (made(), made(padded=False)):
        (tmp_path / "a.gguf").write_bytes(content)
        header = read_gguf_header(tmp_path / "a.gguf")
        assert {n: (e.type, e.shape, e.stop - e.start) for n, e in header.tensors.items()} == {
            "a.weight": ("F16", (4, 8), 64),
            "b": ("F16", (32,), 64),
        }
