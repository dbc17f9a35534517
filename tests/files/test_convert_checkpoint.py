"""Pickled releases on the command line: weights come through whole, nothing is run, nothing is dropped in silence."""

import collections
import importlib.util
import io
import os
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tessera.methods.files.safetensors_file import SafetensorsFile

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def m():
    spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "scripts" / "convert_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LEFT = {None: [], "state_dict": ["Left out: epoch (int)."], "model/ema": ["Left out: epoch (int), model/epoch (int)."]}


def weights() -> dict[str, torch.Tensor]:
    table = torch.randn(6, 4)
    return {
        "a.weight": table,
        "tied.weight": table,
        "slice": table[1:3],
        "transposed": table.t(),
        "half": torch.randn(5).half(),
        "brain": torch.randn(3, 3).bfloat16(),
        "ids": torch.arange(4),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "none": torch.zeros(0, 2),
        "fp8": torch.randn(4).to(torch.float8_e4m3fn),
    }


def same(path, want):
    got = SafetensorsFile(path)
    assert set(got) == set(want) and got.metadata == {"format": "pt"}
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name].float(), tensor.float()), name


@pytest.mark.parametrize("key", LEFT)
def test_weights_come_through(m, tmp_path, key):
    want = weights()
    held: object = want
    for name in reversed(key.split("/") if key else []):
        held = {name: held, "epoch": 3}
    torch.save(held, tmp_path / "in.pt")
    lines = m.convert(tmp_path / "in.pt", tmp_path / "out.safetensors")
    same(tmp_path / "out.safetensors", want)
    assert lines[0].startswith(
        f"Wrote {tmp_path}/out.safetensors: 11 tensors{f' under {key}' if key else ''} (6 float32,"
    )
    assert lines[1:] == LEFT[key]
    assert sorted(os.listdir(tmp_path)) == ["in.pt", "out.safetensors"]


def test_one_of_several(m, tmp_path):
    plain, ema = {"a": torch.zeros(2), "step": 5}, collections.OrderedDict(a=torch.ones(2))
    held = {"model": plain, "ema": ema, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}
    torch.save(held, tmp_path / "in.ckpt")
    with pytest.raises(
        ValueError, match=r"several sets of weights: model \(2 entries\), ema \(1 entries\). Say .* --key"
    ):
        m.convert(tmp_path / "in.ckpt", tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="no weights under 'net'. It holds model"):
        m.convert(tmp_path / "in.ckpt", tmp_path / "out.safetensors", "net")
    lines = m.convert(tmp_path / "in.ckpt", tmp_path / "out.safetensors", "model")
    same(tmp_path / "out.safetensors", {"a": plain["a"]})
    assert lines[1] == "Left out: step (int), ema (OrderedDict), optimizer (dict)."
    torch.save({"a": torch.zeros(2), "sub": {"b": torch.ones(1)}}, tmp_path / "mixed.pt")
    assert "sub (dict)" in m.convert(tmp_path / "mixed.pt", tmp_path / "top.safetensors", ".")[1]


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {os.environ.get('EVIL_MARK', '/dev/null')}",)


def test_code_is_never_run(m, tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL_MARK", str(tmp_path / "ran"))
    torch.save({"a": torch.zeros(2), "x": Evil()}, tmp_path / "in.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    for name in ("in.pt", "module.pt"):
        with pytest.raises(ValueError, match=f"^{name} holds more than weights .* nothing was run .*GLOBAL"):
            m.convert(tmp_path / name, tmp_path / "out.safetensors")
    for name, content in (("raw.pt", pickle.dumps(Evil())), ("old.pt", old({"a": torch.zeros(2)}))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is a checkpoint in torch's format from before 1.6"):
            m.convert(tmp_path / name, tmp_path / "out.safetensors")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out.safetensors").exists()


def old(held) -> bytes:
    buffer = io.BytesIO()
    torch.save(held, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def repacked(path: Path, compression=zipfile.ZIP_STORED, **replaced: bytes) -> None:
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, replaced.get(name.rpartition("/")[2].replace(".", "_"), content))


def test_archives_that_are_refused(m, tmp_path):
    source, target = tmp_path / "in.pt", tmp_path / "out.safetensors"

    def refused(sentence):
        with pytest.raises(ValueError, match=f"^in.pt:? .*{sentence}") as told:
            m.convert(source, target)
        assert "\n" not in str(told.value) and not target.exists()

    torch.save({"a": torch.zeros(1 << 20)}, source)
    repacked(source, zipfile.ZIP_DEFLATED)  # 4 MB in some kB
    assert source.stat().st_size < 1 << 16
    refused("is compressed")
    torch.save({"a": torch.zeros(9)}, source)
    data = bytearray(source.read_bytes())
    at = data.index(b"PK\x01\x02")  # the archive's list: sizes of its first part
    data[at + 20 : at + 28] = (1 << 30).to_bytes(4, "little") * 2
    source.write_bytes(data)
    refused("claims 1,073,7.* bytes of content and has")
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, source)
    refused(r"'a' float32 \[1099511627776\] is unfolded from 4 bytes")
    whole = torch.zeros(1 << 12)
    torch.save({f"t{i}": whole for i in range(9)}, source)
    refused("unfold to 147,456")
    torch.save({"a": torch.zeros(2, device="meta")}, source)
    refused(r"\(meta\) cannot be written")
    torch.save({"a": torch.zeros(2, dtype=torch.complex128)}, source)
    refused("cannot be written")
    torch.save({3: torch.zeros(2)}, source)
    refused("holds no tensors by name, but a dict")
    torch.save([torch.zeros(2)], source)
    refused("holds no tensors by name, but a list")
    for part, sentence in (("x/code/a.py", "TorchScript"), ("readme.txt", "not one of torch.save")):
        with zipfile.ZipFile(source, "w") as archive:
            archive.writestr(part, "hello")
        refused(sentence)
    for content, sentence in (
        (b"", "is no checkpoint"),
        (bytes(8) + b"{}", "the loaders take it as it is"),
        (b"GGUF", "as it is"),
    ):
        source.write_bytes(content)
        refused(sentence)


def test_targets_that_are_refused(m, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "in.pt")
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    for source, target, sentence in (
        ("in.pt", "there.safetensors", "exists already"),
        ("in.pt", "out.pt", "must end in .safetensors"),
        ("no.pt", "out.safetensors", "There is no file"),
        ("in.pt", "no/out.safetensors", "There is no folder"),
    ):
        with pytest.raises(ValueError, match=sentence):
            m.convert(tmp_path / source, tmp_path / target)
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"


def test_an_interrupt_leaves_nothing(m, tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(1)}, tmp_path / "in.pt")
    monkeypatch.setattr(m.os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        m.convert(tmp_path / "in.pt", tmp_path / "out.safetensors")
    assert os.listdir(tmp_path) == ["in.pt"]


def test_damage_at_random(m, tmp_path):
    """Whatever is wrong with a checkpoint is one sentence with its name, and leaves no file."""
    source, target = tmp_path / "in.pt", tmp_path / "out.safetensors"
    torch.save({"state_dict": weights()}, source)
    whole, rng, refused = source.read_bytes(), random.Random(1), 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 3, 20))):
            at = rng.randrange(len(data))
            if rng.random() < 0.1:
                del data[at:]
                break
            data[at] = rng.randrange(256)
        source.write_bytes(data)
        try:
            m.convert(source, target)
            assert len(SafetensorsFile(target)) > 0
            target.unlink()
        except ValueError as error:
            refused += 1
            assert "in.pt" in str(error) and "\n" not in str(error), error
            assert os.listdir(tmp_path) == ["in.pt"]
    assert refused > 50


def test_command_line(tmp_path):
    torch.save({"ema": {"a": torch.ones(2)}}, tmp_path / "in.pt")
    command = [sys.executable, "-m", "scripts.convert_checkpoint", str(tmp_path / "in.pt")]
    done = subprocess.run([*command, str(tmp_path / "a.safetensors")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 tensors under ema (1 float32)" in done.stdout, done.stderr
    same(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    done = subprocess.run([*command, str(tmp_path / "a.safetensors")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "a.safetensors exists already; remove it or give another name.\n"
