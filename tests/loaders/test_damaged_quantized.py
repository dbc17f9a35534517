"""Damaged files of our own format: each is refused in one sentence with the file and the layer, and none crashes."""

import json
import random

import pytest
import torch
from quantized_files import files  # noqa: F401 - a fixture
from safetensors.torch import load_file, save_file

from tessera.methods.quant.recipe import mark
from tessera.patching.quant_load import load

LAYER = "double_blocks.0.img_mlp.0"
W = f"{LAYER}.weight"


def told(tensors) -> dict:
    return json.loads(bytes(tensors[f"{LAYER}.comfy_quant"].tolist()))


def recipe(**changes):
    def change(tensors):
        made = {k: v for k, v in (told(tensors) | changes).items() if v is not None}
        tensors[f"{LAYER}.comfy_quant"] = mark(made)

    return change


def without(name: str):
    return lambda tensors: tensors.pop(name)


def with_(name: str, value):
    def change(tensors):
        tensors[name] = value(tensors[name]).contiguous() if callable(value) else value

    return change


def twice(order: torch.Tensor) -> torch.Tensor:
    order = order.clone()
    order[0] = order[1]
    return order


def spoiled(value: float):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return change


DAMAGES = {
    "no json": ("tlq4", with_(f"{LAYER}.comfy_quant", lambda t: t[:5]), "comfy_quant is not JSON"),
    "json of a list": ("tlq4", with_(f"{LAYER}.comfy_quant", torch.tensor([*b"[1, 2]"], dtype=torch.uint8)), ""),
    "no format": ("tlq4", recipe(format=None), ""),
    "unknown format": ("tlq4", recipe(format="marble"), "has the format 'marble'; known are"),
    "unknown codec": ("tlq4", recipe(codec="table9"), "codec 'table9'"),
    "unhashable codec": ("tlq4", recipe(codec=["table4"]), "codec"),
    "group": ("tlq4", recipe(group=60), "group"),
    "another group": ("tlq4", recipe(group=32), "groups of 32 needs scales"),
    "huge group": ("tlq4", recipe(group=1 << 23), ""),
    "columns": ("tlq4", recipe(columns=100), "columns"),
    "negative columns": ("tlq4", recipe(columns=-128), "columns"),
    "unknown rotation": ("tlq4", recipe(rotation="sideways"), ""),
    "block": ("tlq4", recipe(block=48), "do not divide"),
    "text for a block": ("tlq4", recipe(block="64"), ""),
    "unknown activations": ("tlq4", recipe(activation="int2"), "activations 'int2'"),
    "no scale": ("tlq4", without(W + "_scale"), "needs scales .* got none"),
    "no table": ("tlq4", without(W + "_table"), "needs a table of 16 values, got none"),
    "no signs": ("tlq4", without(W + "_signs"), ""),
    "no weight": ("tlq4", without(W), "weight itself is missing"),
    "NaN scale": ("tlq4", with_(W + "_scale", spoiled(float("nan"))), "finite"),
    "infinite table": ("tlq4", with_(W + "_table", spoiled(float("inf"))), "finite"),
    "flat scale": ("tlq4", with_(W + "_scale", lambda t: t.flatten()), "2 dimensions are needed"),
    "short weight": ("tlq4", with_(W, lambda t: t[:, :-1]), "needs bytes"),
    "weight of floats": ("tlq4", with_(W, lambda t: t.float()), "needs bytes"),
    "half of the rows": ("tlq4", with_(W, lambda t: t[:7]), "needs scales"),
    "core's format": ("tlq4", recipe(format="nvfp4"), "weight_scale|nvfp4"),
    "int8 payload": ("tlq4", lambda t: (recipe(format="nvfp4")(t), with_(W, lambda w: w.view(torch.int8))(t)), "nvfp4"),
    "permutation": ("svdquant", with_(W + "_permutation", twice), "each of 128 columns once"),
    "long permutation": ("svdquant", with_(W + "_permutation", lambda t: torch.cat((t, t))), "for 128 columns"),
    "permutation of floats": ("svdquant", with_(W + "_permutation", lambda t: t.float()), ""),
    "up alone": ("svdquant", without(W + "_down"), "low-rank branch"),
    "another rank": ("svdquant", with_(W + "_up", lambda t: t[:, :-1]), "low-rank branch has up"),
    "another height": ("svdquant", with_(W + "_up", lambda t: t[:-1]), "low-rank branch has up"),
    "whole numbers": ("svdquant", with_(W + "_up", lambda t: t.to(torch.int64)), ""),
    "up of three dimensions": ("svdquant", with_(W + "_up", lambda t: t[None]), "2 dimensions are needed"),
    "parts": ("tlq4", recipe(format="tessera_parts", axis="rows", parts=[{"kind": "svd"}]), ""),
    "endless parts": ("tlq4", recipe(format="tessera_parts", axis="rows", parts=5), ""),
}  # fmt: skip


def written(files, tmp_path, kind: str, change):  # noqa: F811
    tensors = load_file(files / f"{kind}.safetensors")
    change(tensors)
    path = tmp_path / "damaged.safetensors"
    save_file(tensors, path)
    return str(path)


@pytest.mark.parametrize("name", DAMAGES)
def test_damages(files, tmp_path, name):  # noqa: F811
    kind, change, sentence = DAMAGES[name]
    with pytest.raises(ValueError, match=sentence) as raised:
        load(written(files, tmp_path, kind, change))
    text = str(raised.value)
    assert "damaged.safetensors" in text and LAYER in text and len(text) < 700 and "\n" not in text


def test_a_weight_of_another_model(files, tmp_path):  # noqa: F811
    def change(tensors):
        for suffix in ("", "_scale"):
            tensors[W + suffix] = tensors[W + suffix].repeat(2, 1)

    with pytest.raises(ValueError, match=r"damaged.safetensors.*img_mlp.0.*\[1024, 128\].*\[512, 128\]"):
        load(written(files, tmp_path, "tlq4", change))


def damage(tensors: dict, rng: random.Random) -> None:
    """One random change of a quantized layer's tensors or settings."""
    layers = sorted(k.removesuffix(".comfy_quant") for k in tensors if k.endswith(".comfy_quant"))
    layer = rng.choice(layers)
    names = sorted(k for k in tensors if k.startswith(f"{layer}.") and not k.endswith("bias"))
    name, kind = rng.choice(names), rng.randrange(7)
    tensor = tensors[name]
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[name] = tensor.reshape(-1)[: rng.randrange(tensor.numel())].clone()
    elif kind == 2:
        tensors[name] = torch.cat((tensor, tensor), dim=rng.randrange(tensor.ndim))
    elif kind == 3:
        tensors[name] = tensor.to(rng.choice([torch.float32, torch.int64, torch.int8, torch.bool, torch.float16]))
    elif kind == 4:
        tensors[name] = tensor.t().contiguous() if tensor.ndim == 2 else tensor[None]
    elif kind == 5:
        tensors[name] = tensor.new_empty(0)
    else:
        key = f"{layer}.comfy_quant"
        found = json.loads(bytes(tensors[key].tolist()))
        value = rng.choice([None, -1, 0, 3, 1 << 40, "x", [], {}, 0.5, True, "int8", "nvfp4", "tessera_parts"])
        found[rng.choice([*found, "activation", "rotation"])] = value
        tensors[key] = mark(found)


@pytest.mark.parametrize("kind", ["tlq4", "svdquant"])
def test_random_damages(files, tmp_path, kind):  # noqa: F811
    """A ValueError with the file's name or a model whose layers multiply; nothing else."""
    plain, refused = load_file(files / f"{kind}.safetensors"), 0
    for seed in range(50):
        tensors = dict(plain)
        damage(tensors, random.Random(seed))
        save_file(tensors, tmp_path / "fuzzed.safetensors")
        try:
            model = load(str(tmp_path / "fuzzed.safetensors"))
        except ValueError as error:
            assert str(error).startswith("fuzzed.safetensors"), seed
            refused += 1
            continue
        layer = model.model.diffusion_model.get_submodule(LAYER)
        assert layer(torch.randn(2, 128)).shape == (2, 512), seed
    assert refused > 30
