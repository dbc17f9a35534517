"""Valid files damaged at random: a reader says ValueError with the file's name or gives tensors of the right sizes;
never another exception, never much memory."""

import random
import tracemalloc

import pytest
import torch
from gguf_helper import Made
from safetensors.torch import save_file

from tessera.kernels.quant.packed import Packed
from tessera.methods.files.gguf_file import GgufFile
from tessera.methods.files.safetensors_file import SafetensorsFile

CASES = 400
NUMBERS = [
    0,
    1,
    7,
    8,
    255,
    1 << 15,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    1 << 62,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
]


def safetensors(path) -> bytes:
    tensors = {
        "a.weight": torch.ones(8, 4),
        "a.weight_scale": torch.ones(8),
        "b": torch.ones(3, 5).half(),
        "c": torch.arange(9).to(torch.int8),
    }
    save_file(tensors, path, {"format": "pt"})
    return path.read_bytes()


def gguf(path) -> bytes:
    q8 = bytes([0, 60]) + bytes(32)
    made = Made(
        [
            ("general.architecture", 8, "wan"),
            ("general.alignment", 4, 32),
            ("comfy.gguf.orig_shape.b", 9, (5, [2, 2, 3])),
            ("texts", 9, (8, ["x", "yz"])),
        ],
        [
            ("a.weight", (4, 64), "Q8_0", q8 * 8),
            ("b", (4, 3), "F32", bytes(48)),
            ("c.weight", (2, 256), "Q6_K", bytes(420)),
        ],
    )
    return made.write(path).read_bytes()


def damage(rng: random.Random, whole: bytes, head: int) -> bytes:
    """One to three changes, most of them in the header: bits, bytes, numbers, cuts, repeats, digits."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(max(1, min(len(data), head if rng.random() < 0.9 else len(data))))
        act = rng.randrange(7)
        if not data or act == 0:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 2, 8, 64))))
        elif act == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif act == 2:
            del data[at : at + rng.choice((1, 3, 8, 100))]
        elif act == 3:
            size = rng.choice((4, 8))
            data[at : at + size] = (rng.choice(NUMBERS) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        elif act == 4:
            del data[at:]
        elif act == 5:
            part = data[at : at + rng.randrange(1, 80)]
            data[at:at] = part
        else:
            digits = [i for i, byte in enumerate(data[:head]) if 48 <= byte < 58]
            if digits:
                data[rng.choice(digits)] = rng.choice(b"0123456789-e.")
    return bytes(data)


@pytest.mark.parametrize(
    ("kind", "make", "reader"), [("safetensors", safetensors, SafetensorsFile), ("gguf", gguf, GgufFile)]
)
def test_damage_at_random(tmp_path, kind, make, reader):
    path = tmp_path / f"w.{kind}"
    whole = make(path)
    head = int.from_bytes(whole[:8], "little") + 8 if kind == "safetensors" else whole.rindex(b"c.weight") + 40
    sentences, read = set(), 0
    rng = random.Random(7)
    tracemalloc.start()
    for _ in range(CASES):
        path.write_bytes(damage(rng, whole, head))
        try:
            file = reader(path)
            for name in file:
                tensor = file[name]
                assert (tensor.data if isinstance(tensor, Packed) else tensor).numel() < 1 << 16
            read += 1
        except ValueError as error:
            assert path.name in str(error) and "\n" not in str(error), error
            sentences.add("".join(c for c in str(error) if not c.isdigit())[:60])
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4 << 20, most
    assert len(sentences) > 20 and read < CASES / 4, (len(sentences), read)


def test_cut_anywhere(tmp_path):
    """Every prefix of a file is refused."""
    for make, reader, name in ((safetensors, SafetensorsFile, "w.safetensors"), (gguf, GgufFile, "w.gguf")):
        path = tmp_path / name
        whole = make(path)
        body = whole.rstrip(b"\0") if name == "w.gguf" else whole
        for end in range(0, len(body), 3):
            path.write_bytes(whole[:end])
            with pytest.raises(ValueError, match=f"^{name} cannot be read: "):
                reader(path)
