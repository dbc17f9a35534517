"""Layers of several parts, as a saved model holds them: damaged ones are refused before a product meets them."""

import dataclasses

import pytest
import torch
from pack import use_comfyui

use_comfyui()

from tessera.patching import quant_parts as m

PART = m.Part("svd", 64, 128, 16)
TOLD = {"format": m.FORMAT, "axis": "rows", "parts": [dataclasses.asdict(PART)]}


def tensors():
    found = {f"L.weight_{name}": torch.ones(size) for name, size in PART.sizes.items() if name != "data"}
    return {"L.weight": torch.zeros(PART.sizes["data"], dtype=torch.int8), **found}


def read(parts, **changed):
    return m.read("file", "L", {**TOLD, "parts": [TOLD["parts"][0] | changed]}, parts, torch.float32)


def test_a_whole_one_is_read():
    made = read(tensors())
    assert tuple(made.shape) == (64, 128) and m.product(torch.ones(1, 128), made, None).isfinite().all()


@pytest.mark.parametrize("name", sorted(tensors()))
def test_a_missing_tensor(name):
    parts = tensors()
    del parts[name]
    with pytest.raises(ValueError, match="^file: layer L: .* is missing"):
        read(parts)


@pytest.mark.parametrize("change", [lambda t: t.int(), lambda t: t.view(2, -1), lambda t: t * torch.nan])
@pytest.mark.parametrize("name", ["scale", "smooth", "proj_down", "proj_up"])
def test_no_list_of_finite_numbers(name, change):
    parts = tensors()
    parts[f"L.weight_{name}"] = change(parts[f"L.weight_{name}"])
    with pytest.raises(ValueError, match=f"^file: layer L: weight_{name} .* is not 1-d of finite floats"):
        read(parts)


@pytest.mark.parametrize("changed", [{"rank": 16.0}, {"rows": True}, {"columns": 96}, {"unsigned": "x"}, {"kind": "?"}])
def test_parts_that_cannot_be(changed):
    with pytest.raises(ValueError, match="are none that are known"):
        read(tensors(), **changed)


@pytest.mark.parametrize(
    "branch", [{"down": (4, 128)}, {"down": (4, 128), "up": (9, 4)}, {"down": (4, 128), "up": (64, 3)}]
)
def test_a_branch_that_does_not_fit(branch):
    more = {f"L.weight_{name}": torch.ones(shape) for name, shape in branch.items()}
    with pytest.raises(ValueError, match="do not make up .64, 128."):
        read(tensors() | more)
