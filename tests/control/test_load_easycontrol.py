"""Load EasyControl: the released layout, and what is wrong with a file."""

import json
from pathlib import Path

import pytest
import torch

from tessera.methods.control.easycontrol import expected, fits, read

KEYS = json.loads((Path(__file__).resolve().parents[1] / "golden/keys/easycontrol.json").read_text())


def test_the_released_layout():
    rank = 128
    want = {
        KEYS["key"].format(path=path, block=i, part=part, condition=0, end=end): tuple(
            rank if side == "rank" else side for side in shape
        )
        for path, count in KEYS["blocks"].items()
        for i in range(count)
        for part in KEYS["parts"][path]
        for end, shape in KEYS["shapes"].items()
    }
    assert want.keys() > KEYS["examples"].keys()
    assert sum(a * b for a, b in want.values()) == KEYS["parameters_at_rank_128"]
    assert expected(19, 38, 3072, rank) == want
    weights = read({key: torch.empty(shape, device="meta") for key, shape in want.items()}, "canny.safetensors", {})
    assert {key: tuple(t.shape) for key, t in weights.tensors().items()} == want
    assert weights.ranks == (rank, rank)
    fits(weights, 19, 38, 3072)
    with pytest.raises(ValueError, match="19 \\+ 38 blocks of width 3072, but this MODEL has 8 \\+ 38"):
        fits(weights, 8, 38, 3072)


def test_a_file_of_several_conditions():
    two = {**expected(1, 1, 8, 2), **expected(1, 1, 8, 3, condition=1)}
    tensors = {key: torch.full(shape, float(shape[0])) for key, shape in two.items()}
    assert [read(tensors, "two.safetensors", {}, n).ranks for n in (0, 1)] == [(2, 2), (3, 3)]


def test_reading_names_what_is_wrong():
    shapes = expected(1, 1, 8, 2)
    whole = {key: torch.zeros(shape) for key, shape in shapes.items()}
    key = "transformer_blocks.0.attn.processor.proj_loras.0.up.weight"
    cases = [
        ({**whole, "transformer_blocks.0.attn.extra": torch.zeros(1)}, "attn.extra"),
        ({k: v for k, v in whole.items() if k != key}, "lacks transformer_blocks.0.attn.processor.proj_loras"),
        ({**whole, key: torch.zeros(8, 3)}, "down of rank 2 and an up of rank 3"),
        ({**whole, key: torch.zeros(9, 2)}, r"\[9, 2\]"),
        (
            {**whole, "single_transformer_blocks.0.attn.processor.proj_loras.0.up.weight": torch.zeros(8, 2)},
            "proj_loras",
        ),
        ({}, "no LoRA at all"),
    ]
    for tensors, words in cases:
        with pytest.raises(ValueError, match=words):
            read(tensors, "x.safetensors", {})
    with pytest.raises(ValueError, match="holds the conditions 0"):
        read(whole, "x.safetensors", {}, 1)
    assert read(whole, "subject.safetensors", {}).subject
