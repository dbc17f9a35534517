"""Projection files: the released key formats, ours, and what is refused."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tessera.methods.attention import sparse_linear_weights as w

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/keys/turbowan_proj_l.json").read_text())
MODEL = {"architecture": "Wan", "blocks": 3, "shapes": "abc"}
SETTINGS = {"topk": 0.2, "variant": "sla1", "feature_map": "softmax"}


def tensors(form, blocks, d=128, prefix="", dtype=torch.bfloat16):
    """What a released file holds of the projections, beside other tensors of the checkpoint."""
    out = {"patch_embedding.weight": torch.zeros(4, 2), f"{prefix}blocks.0.self_attn.q.weight": torch.zeros(4, 4)}
    for i in range(blocks):
        for key, shape in GOLDEN["formats"][form].items():
            out[prefix + key.format(i=i)] = torch.randn([d] * len(shape)).to(dtype)
    return out


def saved(tmp_path, content, metadata=None, name="file.safetensors"):
    save_file(content, tmp_path / name, metadata)
    return tmp_path / name


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("form", list(GOLDEN["formats"]))
@pytest.mark.parametrize("model", list(GOLDEN["models"]))
def test_released_files_are_read(model, form, prefix, tmp_path):
    blocks, d = GOLDEN["models"][model].values()
    content = tensors(form, blocks, d, prefix)
    got = w.read(saved(tmp_path, content))
    assert list(got.blocks) == [*range(blocks)] and got.model == {}
    assert got.settings == {key: GOLDEN["trained_with"][key] for key in got.settings} and "variant" in got.settings
    keys = [prefix + key for key in GOLDEN["formats"][form]]
    for i, (weight, bias) in got.blocks.items():
        assert torch.equal(weight, content[keys[0].format(i=i)]) and torch.equal(bias, content[keys[1].format(i=i)])


def ours(numbers=(0, 2), d=8):
    return w.Projections("x", {n: (torch.randn(d, d), torch.randn(d)) for n in numbers}, SETTINGS, MODEL)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new" / "mine.safetensors"
    made = ours()
    w.write(path, made)
    w.write(path, made)  # over an earlier one
    got = w.read(path)
    assert (got.name, got.settings, got.model) == ("mine.safetensors", SETTINGS, MODEL)
    for n in (0, 2):
        assert all(torch.equal(a, b) for a, b in zip(got.blocks[n], made.blocks[n], strict=True))
    assert [p.name for p in path.parent.iterdir()] == ["mine.safetensors"], "no temporary file is left"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "mine.safetensors"
    w.write(path, ours())
    before = path.read_bytes()

    def fails(*_):
        raise OSError("no space")

    monkeypatch.setattr(w, "save_file", fails)
    with pytest.raises(OSError, match="no space"):
        w.write(path, ours())
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def edited(change, form="turbodiffusion"):
    content = tensors(form, 3, 8)
    change(content)
    return content


KEY = "blocks.1.self_attn.attn_op.local_attn.proj_l."
WRONG = {
    "none": (lambda c: [c.pop(k) for k in [*c] if "proj_l" in k], "holds no projections"),
    "no bias": (lambda c: c.pop(KEY + "bias"), "lacks the weight or the bias of blocks 1"),
    "a block is missing": (lambda c: [c.pop(KEY + p) for p in ("weight", "bias")], "blocks 0, 2, not of all"),
    "other heads": (lambda c: c.update({KEY + "weight": torch.zeros(4, 4)}), "is BF16|is F32"),
    "not square": (lambda c: c.update({KEY + "weight": torch.zeros(8, 4)}), r"\[8, 4\]"),
    "integers": (lambda c: c.update({KEY + "bias": torch.zeros(8, dtype=torch.int8)}), "is I8"),
    "not finite": (lambda c: c[KEY + "weight"].fill_(torch.nan), "weight of block 1 is not finite"),
    "two formats": (lambda c: c.update({"blocks.1.attn1.attn_impl.proj_l.bias": torch.zeros(8)}), "mixes key formats"),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_do_not_fit_are_refused(name, tmp_path):
    change, words = WRONG[name]
    with pytest.raises(ValueError, match=words) as told:
        w.read(saved(tmp_path, edited(change)))
    assert "file.safetensors" in str(told.value)


def test_more_in_our_own_format_is_refused(tmp_path):
    w.write(tmp_path / "a.safetensors", ours())
    content = load_file(tmp_path / "a.safetensors")
    meta = {"format": w.FORMAT, "version": w.VERSION, "settings": json.dumps(SETTINGS), "model": json.dumps(MODEL)}
    with pytest.raises(ValueError, match="1 tensors that do not belong there, e.g. 'lora'"):
        w.read(saved(tmp_path, {**content, "lora": torch.zeros(1)}, meta))
    for key, text in (("settings", "["), ("model", "[" * 60000), ("model", '{"blocks": [1]}'), ("version", "9"),
                      ("settings", json.dumps({"variant": "x" * 70000}))):  # fmt: skip
        with pytest.raises(ValueError, match="cannot be read"):
            w.read(saved(tmp_path, content, {**meta, key: text}))


def test_damaged_files_are_refused_by_name(tmp_path):
    good = saved(tmp_path, tensors("turbodiffusion", 2, 8)).read_bytes()
    damaged = (b"", b"\1", good[:-7], good[:60], good + b"\0", struct.pack("<Q", 1 << 63), b"\x80\4pickle" + good)
    for n, content in enumerate(damaged):
        path = tmp_path / f"broken{n}.safetensors"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"broken{n}.safetensors is damaged"):
            w.read(path)


def test_far_too_many_tensors_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(w, "TENSORS", 5)
    with pytest.raises(ValueError, match="has 8 tensors"):
        w.read(saved(tmp_path, tensors("turbodiffusion", 3, 8)))


def test_what_a_file_was_made_for():
    made = ours()
    assert w.fits(made, SETTINGS, MODEL) == []
    told = w.fits(made, {**SETTINGS, "topk": 0.5}, {**MODEL, "shapes": "other"})
    assert told == ["topk 0.2 (now 0.5)", "a model whose tensors have other names or shapes"]
    for settings, model, words in (
        ({"variant": "main"}, {}, "made for variant sla1, the node says main"),
        ({"feature_map": "relu"}, {}, "Set feature_map to softmax"),
        ({}, {"architecture": "Flux"}, "fitted on Wan with 3 blocks, this is Flux with 3"),
        ({}, {"blocks": 4}, "this is Wan with 4"),
        ({}, {"blocks": 2}, "this is Wan with 2"),
    ):
        with pytest.raises(ValueError, match=words):
            w.fits(made, {**SETTINGS, **settings}, {**MODEL, **model})
    released = w.Projections("t", ours((0, 1)).blocks, w.OFFICIAL)
    with pytest.raises(ValueError, match="blocks 0-1, this Wan has 3 blocks"):
        w.fits(released, {**SETTINGS, "variant": "main"}, MODEL)
