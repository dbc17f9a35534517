"""Files that are no weights, or bad ones: each loader says which file and what to do, in one sentence."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tessera.methods.attention import graft
from tessera.methods.attention.linfusion import modules_of
from tessera.methods.weight_files import read_weights

HEADS = {"dim_n": 8, "heads": 2, "module_name": "a.attn1"}


def test_damage_is_named(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(64, 64)}, file)
    whole = file.read_bytes()
    assert read_weights(file, "x")[0]["a"].shape == (64, 64)
    for damaged in (b"", whole[:20], whole[:-1], b"<html>not found</html>", whole[:8] + b"{" + whole[9:40]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"weights.safetensors is damaged .*; download it again\.$"):
            read_weights(file, "download it again")


@pytest.mark.parametrize(
    "tensor, sentence",
    [
        (torch.tensor([1.0, float("nan")]), r"b \[2\] is not finite"),
        (torch.tensor([float("inf")]), "not finite"),
        (torch.tensor([1]), "int64 and not floating point"),
    ],
)
def test_numbers_that_are_none(tmp_path, tensor, sentence):
    file = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(2), "b": tensor}, file)
    with pytest.raises(ValueError, match=sentence):
        read_weights(file, "download it again")


@pytest.mark.parametrize("hparams", ["{", "[]", '{"heads": "x"}', '{"eps": "small"}', '{"rope": 3}'])
def test_settings_of_a_graft(tmp_path, hparams):
    file = tmp_path / "graft.safetensors"
    told = {"format": "graft_v1", "op": "linear", "arch": "Flux", "hparams": hparams}
    save_file({"graft.double_blocks.0.gamma": torch.ones(2)}, file, told)
    with pytest.raises(ValueError, match="its hparams must be words by name"):
        graft.load(str(file))


@pytest.mark.parametrize("mid", ["x", 0, -2, 1.5, True])
def test_width_of_a_linfusion_module(mid):
    with pytest.raises(ValueError, match="projection_mid_dim .* must be null, -1 or a width"):
        modules_of(json.dumps({"modules_list": [{**HEADS, "projection_mid_dim": mid}]}))
