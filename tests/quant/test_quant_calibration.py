"""Statistics of inputs: what they mean, how they merge, and their files."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from tessera.methods.quant import calibration
from tessera.methods.quant.calibration import LayerStatistics, Statistics, load, save


def some(tokens=500, channels=24, rows=16, seed=0):
    generator = torch.Generator().manual_seed(seed + 50)
    x = torch.randn(tokens, channels, generator=generator) * torch.linspace(0.1, 4, channels)
    s = LayerStatistics(channels, rows, seed)
    for part in x.split(70):
        s.add(part.reshape(1, -1, channels))
    return s, x


def test_numbers_are_those_of_the_inputs():
    s, x = some()
    peaks = x.abs().amax(1)
    assert s.count == 500 and torch.equal(s.amax, x.abs().amax(0))
    assert torch.allclose(s.mean_square, x.square().mean(0), rtol=1e-5)
    assert s.fluctuation == pytest.approx(float(peaks.std(unbiased=False) / peaks.mean()), rel=1e-4)
    assert s.tokens[3] == peaks.max()


def test_keeps_rows_of_the_inputs_and_no_more():
    s, x = some()
    assert s.rows.shape == (16, 24) and s.rows.dtype == torch.bfloat16
    found = (s.rows[:, None] == x.bfloat16()[None]).all(-1)
    assert found.sum(1).eq(1).all() and len(found.nonzero()[:, 1].unique()) == 16
    few, y = some(tokens=5)
    assert few.rows.shape == (5, 24) and LayerStatistics(24, 0).rows.shape == (0, 24)
    none = LayerStatistics(24, 0)
    none.add(y)
    assert none.rows.shape == (0, 24) and none.count == 5


def test_every_row_has_the_same_chance_however_it_comes():
    hits = torch.zeros(40)
    for seed in range(400):
        s = LayerStatistics(1, 8, seed)
        for part in torch.arange(40.0).split([1, 2, 20, 17]):
            s.add(part[:, None])
        hits[s.rows[:, 0].long()] += 1
    assert hits.sum() == 3200 and (hits - 80).abs().max() < 5 * (400 * 0.2 * 0.8) ** 0.5
    again = LayerStatistics(1, 8, 399)
    for part in torch.arange(40.0).split([1, 2, 20, 17]):
        again.add(part[:, None])
    assert torch.equal(again.rows, s.rows)


def test_merged_is_what_one_would_have_seen():
    (a, x), (b, y) = some(seed=0), some(tokens=300, seed=1)
    kept = torch.cat((a.keys, b.keys)).sort(descending=True).values[:16]
    a.merge(b)
    both = torch.cat((x, y))
    assert a.count == 800 and torch.equal(a.amax, both.abs().amax(0)) and torch.equal(a.keys, kept)
    assert torch.allclose(a.mean_square, both.square().mean(0), rtol=1e-5) and a.rows.shape == (16, 24)
    peaks = both.abs().amax(1)
    assert a.fluctuation == pytest.approx(float(peaks.std(unbiased=False) / peaks.mean()), rel=1e-4)
    with pytest.raises(ValueError, match="24 and 12 channels"):
        a.merge(LayerStatistics(12))


def test_long_inputs_are_taken_in_parts(monkeypatch):
    s, x = some()
    monkeypatch.setattr(calibration, "CHUNK", 24 * 33)
    parts = LayerStatistics(24, 16)
    parts.add(x.reshape(2, 250, 24))
    assert torch.equal(parts.amax, s.amax) and parts.count == 500 and torch.allclose(parts.tokens, s.tokens)
    assert torch.equal(parts.keys, s.keys) and torch.equal(parts.rows, s.rows), "rows do not depend on how they come"


def test_inputs_in_half_precision_do_not_overflow():
    s = LayerStatistics(4)
    s.add(torch.full((3, 4), 6e4, dtype=torch.float16))
    assert torch.equal(s.mean_square, torch.full((4,), 6e4).square()) and s.fluctuation == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("x", "words"),
    [(torch.ones(2, 5), "A layer of 24 input channels met an input of 5"),
     (torch.full((2, 24), torch.nan), "[2, 24] holds numbers that are not finite"),
     (torch.full((2, 24), torch.inf), "not finite")],
)  # fmt: skip
def test_inputs_that_cannot_be_are_refused_and_leave_nothing(x, words):
    s, _ = some()
    before = s.to_tensors()
    with pytest.raises(ValueError) as error:
        s.add(x)
    s.add(torch.ones(0, 24))
    assert words in str(error.value) and all(torch.equal(s.to_tensors()[k], v) for k, v in before.items())


def test_tensors_and_back():
    s, _ = some()
    back = LayerStatistics.from_tensors(s.to_tensors())
    assert back.count == s.count and back.fluctuation == s.fluctuation and torch.equal(back.rows, s.rows)
    back.merge(some(seed=3)[0])
    assert back.count == 1000


def statistics():
    layers = {"blocks.0.attn.qkv": some()[0], "blocks.1.mlp:0": some(channels=8, seed=2)[0]}
    return Statistics(layers, "f00d", 12, "sample_euler")


def test_files_hold_everything(tmp_path):
    path = tmp_path / "folder" / "run.safetensors"
    save(path, statistics())
    found = load(path)
    assert (found.model, found.steps, found.sampler, found.name) == ("f00d", 12, "sample_euler", "run.safetensors")
    assert [*path.parent.iterdir()] == [path] and {*found.layers} == {"blocks.0.attn.qkv", "blocks.1.mlp:0"}
    for layer, s in statistics().layers.items():
        for name, part in s.to_tensors().items():
            assert torch.equal(found.layers[layer].to_tensors()[name], part)
    assert found.for_layer("blocks.0.attn.qkv", 24).count == 500 and found.for_layer("other", 24) is None
    with pytest.raises(ValueError, match="run.safetensors has 24 input channels for blocks.0.attn.qkv, the model 32"):
        found.for_layer("blocks.0.attn.qkv", 32)


def test_a_failed_save_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    save(path, statistics())
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(calibration.SafetensorsWriter, "_finish", fail)
    with pytest.raises(OSError, match="disk full"):
        save(path, statistics())
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


LAYER = "blocks.0.attn.qkv"
DAMAGES = {
    "missing": (lambda t, m: t.pop(f"{LAYER}:keys"), "keys is missing"),
    "unknown": (lambda t, m: t.update({f"{LAYER}:extra": torch.ones(2)}), "extra is unknown"),
    "width": (
        lambda t, m: t.update({f"{LAYER}:amax": torch.ones(5)}),
        "square_sum is float64 [24] and should be float64 [5]",
    ),
    "rank": (lambda t, m: t.update({f"{LAYER}:amax": torch.ones(24, 1, 1)}), "is no part of a layer's statistics"),
    "dtype": (lambda t, m: t.update({f"{LAYER}:rows": t[f"{LAYER}:rows"].float()}), "rows is float32 [16, 24]"),
    "nan": (lambda t, m: t[f"{LAYER}:amax"].fill_(torch.nan), "amax holds numbers that are not finite or negative"),
    "negative": (lambda t, m: t[f"{LAYER}:square_sum"].fill_(-1), "square_sum holds numbers"),
    "infinite rows": (lambda t, m: t[f"{LAYER}:rows"].fill_(torch.inf), "rows holds numbers"),
    "count": (lambda t, m: t[f"{LAYER}:tokens"].fill_(3), "it keeps 16 rows of 3 tokens"),
    "too many": (lambda t, m: t[f"{LAYER}:tokens"].fill_(1e300), "it keeps 16 rows of 1e+300 tokens"),
    "beyond": (lambda t, m: t[f"{LAYER}:square_sum"].fill_(1e300), "square_sum holds numbers beyond fp32"),
    "fraction": (lambda t, m: t[f"{LAYER}:tokens"].fill_(99.5), "it keeps 16 rows of 99.5 tokens"),
    "no layer": (lambda t, m: t.update({"plain": torch.ones(2)}), "plain [2] is no part of a layer's statistics"),
    "too wide": (lambda t, m: t.update({"x:amax": torch.ones(1 << 19)}), "x:amax [524288] is no part"),
    "too many rows": (lambda t, m: t.update({"x:rows": torch.ones(1 << 14, 1)}), "x:rows [16384, 1] is no part"),
    "empty": (lambda t, m: t.clear(), "has no layer"),
    "another format": (lambda t, m: m.update(format="x"), "is no calibration of quantization"),
    "version": (lambda t, m: m.update(version="2"), "has version '2' and this pack reads 1"),
    "no model": (lambda t, m: m.pop("model"), "does not say which model, sampler and steps"),
    "long note": (lambda t, m: m.update(sampler="x" * 5000), "does not say which model, sampler and steps"),
    "steps": (lambda t, m: m.update(steps="-3"), "says '-3' steps"),
    "huge steps": (lambda t, m: m.update(steps="9" * 5000), "does not say which"),
    "superscript steps": (lambda t, m: m.update(steps="²"), "which is no number"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_by_name(tmp_path, damage):
    path = tmp_path / "run.safetensors"
    save(path, statistics())
    tensors = load_file(path)
    metadata = {"format": calibration.FORMAT, "version": "1", "model": "f00d", "sampler": "e", "steps": "12"}
    change, words = DAMAGES[damage]
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError) as error:
        load(path)
    text = str(error.value)
    assert words in text and text.startswith("run.safetensors") and "Calibrate Quantization" in text
    assert damage not in ("missing", "nan", "count") or LAYER in text


def raw(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD_BYTES = {
    "empty": b"",
    "short": b"abc",
    "header past the end": raw(b"{}", length=1 << 20),
    "huge header": raw(b"{}", length=1 << 63),
    "no json": raw(b"\xff" * 64),
    "deep json": raw(b"[" * 100_000),
    "unknown dtype": raw(json.dumps({"x:amax": entry([1], [0, 4], "F7")}).encode(), b"0000"),
    "overlap": raw(json.dumps({"x:amax": entry([1], [0, 4]), "x:keys": entry([1], [0, 4])}).encode(), b"0000"),
    "overflow": raw(json.dumps({"x:amax": entry([1 << 32, 1 << 32], [0, 4])}).encode(), b"0000"),
    "hole": raw(json.dumps({"x:amax": entry([1], [4, 8])}).encode(), b"00000000"),
    "trailing": raw(json.dumps({"x:amax": entry([1], [0, 4])}).encode(), b"00000000"),
    "duplicate": raw(
        b'{"x:amax":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x:amax":{"dtype":"F32","shape":[1],'
        b'"data_offsets":[0,4]}}',
        b"0000",
    ),
    "metadata of numbers": raw(json.dumps({"__metadata__": {"format": 3}}).encode()),
    "pickle": b"PK\x03\x04" + b"0" * 64,
}


@pytest.mark.parametrize("case", BAD_BYTES)
def test_broken_bytes_are_refused(tmp_path, case):
    path = tmp_path / "run.safetensors"
    path.write_bytes(BAD_BYTES[case])
    with pytest.raises(ValueError, match=r"^run.safetensors cannot be read: .*\.$"):
        load(path)


def test_a_truncated_and_a_missing_file_are_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    save(path, statistics())
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"run.safetensors cannot be read: .* an incomplete download"):
        load(path)
    with pytest.raises(ValueError, match="other.safetensors cannot be read: No such file"):
        load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="it is no ordinary file"):
        load(tmp_path)


def test_a_loaded_file_may_be_written_again(tmp_path):
    path = tmp_path / "run.safetensors"
    save(path, statistics())
    found = load(path)
    before = found.layers[LAYER].rows.clone()
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(found.layers[LAYER].rows, before)


def test_statistics_need_channels():
    with pytest.raises(ValueError, match="at least 1 channel and 0 rows, got 0 and -1"):
        LayerStatistics(0, -1)
