"""GGUF files: every byte value decoded as gguf's own decoders do, ComfyUI-GGUF's conventions, nothing copied."""

import gc
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_helper import Made

from tessera.kernels.quant.packed import Packed, decode
from tessera.methods.files.gguf_file import GgufFile
from tessera.methods.files.gguf_header import BLOCKS, read_gguf_header

QUANTIZED = ["Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
HALVES = {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where fp16 scales lie


def blocks(kind: str, rows: int, columns: int) -> np.ndarray:
    """Bytes [rows, bytes of a row]; each place of a block takes all 256 values where there are as many blocks. Scales are
    finite and of many sizes."""
    block, size = BLOCKS[kind]
    rng = np.random.default_rng(3)
    count = rows * columns // block
    data = ((np.arange(count)[:, None] + 37 * np.arange(size)) % 256).astype(np.uint8)
    for at in HALVES[kind]:
        scales = rng.standard_normal(count) * 10.0 ** rng.integers(-7, 3, count)
        data[:, at : at + 2] = scales.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_decoded_as_gguf_does(tmp_path, kind, prefix):
    data = blocks(kind, 64, 1024)
    made = Made([("general.architecture", 8, "flux")], [(f"{prefix}a.weight", (64, 1024), kind, data.tobytes())])
    file = GgufFile(made.write(tmp_path / "a.gguf"))
    got = file["a.weight"]
    assert isinstance(got, Packed) and (got.codec, got.columns) == (kind.lower(), 1024) and [*file] == ["a.weight"]
    want = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(decode(got).numpy(), want)
    assert np.array_equal(got.data.numpy(), data) and file.shape("a.weight") == (64, 1024)


def test_files_of_ggufs_own_writer(tmp_path):
    """What the package gguf writes and quantizes: names, shapes, types, values, metadata, padding."""
    rng = np.random.default_rng(0)
    plain = {
        "img_in.bias": rng.standard_normal(7).astype(np.float32),
        "b.weight": rng.standard_normal((3, 5, 2, 2)).astype(np.float16),
        "one": np.float32(3).reshape(1),
    }
    weight = rng.standard_normal((6, 512)).astype(np.float32)
    writer = gguf.GGUFWriter(str(tmp_path / "w.gguf"), "wan")
    writer.add_quantization_version(2)
    writer.add_array("some.sizes", [1, 2, 3])
    writer.add_array("tokens", [f"t{i}" for i in range(5000)])
    for name, data in plain.items():
        writer.add_tensor(name, data)
    for kind in ("Q4_0", "Q8_0", "BF16"):
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{kind}.weight", gguf.quants.quantize(weight, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "w.gguf")
    assert file.architecture == "wan" and file.metadata["some.sizes"] == (1, 2, 3)
    assert file.header.left_out == {"tokens": 5000} and file.warnings == []
    for name, data in plain.items():
        assert file[name].dtype == {2: torch.float16, 4: torch.float32}[data.itemsize]
        assert np.array_equal(file[name].numpy(), data), name
    for kind in ("Q4_0", "Q8_0"):
        want = gguf.quants.dequantize(gguf.quants.quantize(weight, q := gguf.GGMLQuantizationType[kind]), q)
        assert np.array_equal(decode(file[f"{kind}.weight"]).numpy(), want)
    assert torch.equal(file["BF16.weight"], torch.from_numpy(weight).bfloat16())
    assert file.types() == {"F32": 2, "F16": 1, "Q4_0": 1, "Q8_0": 1, "BF16": 1}


def test_shapes_before_the_blocks(tmp_path):
    """A reshaped convolution comes back in its own shape, decoded; so does what is quantized and no weight [N, K]."""
    data = blocks("Q8_0", 9, 256)
    made = Made(
        [
            ("general.architecture", 8, "sd3"),
            ("comfy.gguf.orig_shape.conv.weight", 9, (5, [16, 9, 4, 4])),
            ("comfy.gguf.orig_shape.plain", 9, (5, [4, 2, 2])),
        ],
        [
            ("conv.weight", (9, 256), "Q8_0", data.tobytes()),
            ("table", (9, 256), "Q8_0", data.tobytes()),
            ("plain", (2, 8), "F16", np.arange(16, dtype=np.float16).tobytes()),
            ("norm.bias", (4,), "BF16", torch.arange(4).bfloat16().view(torch.uint8).numpy().tobytes()),
        ],
    )
    file = GgufFile(made.write(tmp_path / "a.gguf"))
    want = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q8_0))
    assert torch.equal(file["conv.weight"], want.reshape(16, 9, 4, 4)) and torch.equal(file["table"], want)
    assert torch.equal(file["plain"], torch.arange(16).half().view(4, 2, 2))
    assert torch.equal(file["norm.bias"], torch.arange(4.0)) and file["norm.bias"].dtype == torch.float32


@pytest.mark.parametrize("alignment", [1, 32, 64])
def test_nothing_is_copied(tmp_path, alignment):
    """Tensors are windows on the mapped file: what is written into them never reaches it."""
    data = blocks("Q4_0", 8, 64)
    metadata = [("general.alignment", 4, alignment), ("general.architecture", 8, "wan")]
    made = Made(metadata, [("a.weight", (8, 64), "Q4_0", data.tobytes())], alignment=alignment)
    path = made.write(tmp_path / "a.gguf")
    before = path.read_bytes()
    file = GgufFile(path)
    first, second = file["a.weight"].data, file["a.weight"].data
    assert first.data_ptr() == second.data_ptr() == file._bytes.all.data_ptr() + file.header.tensors["a.weight"].start
    first.zero_()
    assert path.read_bytes() == before


def test_tensors_beside_the_model(tmp_path):
    tensors = [("model.diffusion_model.a", (2,), "F32", bytes(8)), ("vae.b", (2,), "F32", bytes(8))]
    file = GgufFile(Made([], tensors).write(tmp_path / "a.gguf"))
    assert [*file] == ["a"] and file.left_out == ["vae.b"]


def test_a_large_file_takes_no_memory(tmp_path):
    """Opening, and holding all tensors, of 48 MB: scales are looked at in chunks, weights are windows."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs Linux's /proc")

    def held():
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))  # kB

    data = np.tile(blocks("Q4_K", 64, 1024), (2, 1)).tobytes()
    rows = len(data) * 16 // 576
    tensors = [(f"{i}.weight", (rows, 1024), "Q4_K", data * 16) for i in range(40)]
    Made([("general.architecture", 8, "flux")], tensors).write(tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").stat().st_size > 40 << 20
    del data, tensors
    gc.collect()
    before = held()
    file = GgufFile(tmp_path / "a.gguf")
    weights = [file[name] for name in file]
    assert len(weights) == 40 and held() - before < 8 << 10


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("sdxl", r"it is a U-Net \(sdxl\)"),
        ("t5", "it is a text encoder"),
        ("brand_new", "its architecture is 'brand_new'; known are flux"),
    ],
)
def test_architectures_that_are_refused(tmp_path, name, sentence):
    made = Made([("general.architecture", 8, name)], [("a", (2,), "F32", bytes(8))])
    with pytest.raises(ValueError, match=f"^a.gguf cannot be read: {sentence}"):
        GgufFile(made.write(tmp_path / "a.gguf"))


def test_one_part_of_a_file_in_several(tmp_path):
    for count in (1, 3):
        Made([("split.count", 2, count)], [("a", (2,), "F32", bytes(8))]).write(tmp_path / "a.gguf")
        if count == 1:
            assert [*GgufFile(tmp_path / "a.gguf")] == ["a"]
    with pytest.raises(ValueError, match="^a.gguf cannot be read: it is one of 3 parts; merge them"):
        GgufFile(tmp_path / "a.gguf")


@pytest.mark.parametrize("metadata", [[], [("general.architecture", 8, "pig")]])
def test_architecture_left_to_the_keys(tmp_path, metadata):
    file = GgufFile(Made(metadata, [("a", (2,), "F32", bytes(8))], version=2).write(tmp_path / "a.gguf"))
    assert file.architecture is None and file.header.version == 2 and torch.equal(file["a"], torch.zeros(2))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_scales_that_are_not_finite(tmp_path, kind):
    for at in HALVES[kind]:
        for bad in (np.float16("nan"), np.float16("-inf")):
            data = blocks(kind, 4, 512)
            width = BLOCKS[kind][1]
            data.reshape(-1, width)[-1, at : at + 2] = np.array([bad]).view(np.uint8)
            made = Made([], [("a.weight", (4, 512), kind, data.tobytes())])
            with pytest.raises(ValueError, match=r"^a.gguf cannot be read: the scales in tensor a.weight are not"):
                GgufFile(made.write(tmp_path / "a.gguf"))


def test_weights_that_are_not_finite_are_told(tmp_path):
    data = torch.zeros(30_000)
    data[-1] = float("nan")
    made = Made([], [("a", (30_000,), "F32", data.numpy().tobytes())])
    assert GgufFile(made.write(tmp_path / "a.gguf")).warnings == [
        "Not all weights are finite: a. The image may be black; download the file again."
    ]


def test_the_reader_knows_what_it_names():
    """Numbers and block sizes against the package gguf."""
    from tessera.methods.files.gguf_header import OTHERS, TYPES

    for number, name in (TYPES | OTHERS).items():
        if name != "NVFP4":
            assert gguf.GGMLQuantizationType(number).name == name
    assert {gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == sizes for name, sizes in BLOCKS.items()} == {True}
    assert read_gguf_header.__module__.endswith("gguf_header")
