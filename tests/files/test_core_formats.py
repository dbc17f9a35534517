"""Layers in ComfyUI's own quantized formats: what its own quantizers write passes, every misfit is named."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tessera.methods.files import core_formats as m
from tessera.methods.files.safetensors_file import SafetensorsFile


@pytest.fixture(scope="module")
def quantized(host):
    """format -> tensors of a layer `a` [48, 512] as ComfyUI's own layouts write them."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    torch.manual_seed(0)
    made = {}
    for kind, algo in QUANT_ALGOS.items():
        more = {"per_channel": True} if kind == "int8_tensorwise" else {}
        weight = QuantizedTensor.from_float(torch.randn(48, 512).bfloat16(), algo["comfy_tensor_layout"], **more)
        made[kind] = weight.state_dict("a.weight")
    return made


def opened(tmp_path, tensors, layers=None, quant=None) -> SafetensorsFile:
    metadata = {} if layers is None else {"_quantization_metadata": json.dumps({"layers": layers})}
    if quant is not None:
        text = quant if isinstance(quant, bytes) else json.dumps(quant).encode()
        tensors = tensors | {"a.comfy_quant": torch.tensor(list(text), dtype=torch.uint8)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "w.safetensors", metadata)
    return SafetensorsFile(tmp_path / "w.safetensors")


def test_all_of_cores_formats(quantized, tmp_path):
    assert set(quantized) == set(m.FORMATS)
    for kind, tensors in quantized.items():
        told = {"format": kind}
        assert m.check_layers(opened(tmp_path, tensors, {"a": told})) == {"a": told}
        assert m.check_layers(opened(tmp_path, tensors, quant=told)) == {"a": told}
    old = {key: t.view(torch.uint8) if key == "a.weight_scale" else t for key, t in quantized["nvfp4"].items()}
    assert m.check_layers(opened(tmp_path, old, {"a": {"format": "nvfp4"}}))
    bank = {"a.weight": torch.zeros(2, 3, 4).to(torch.int8), "a.weight_scale": torch.ones(2, 3, 1)}
    assert m.check_layers(opened(tmp_path, bank, quant={"format": "int8_tensorwise", "num_experts": 2}))
    assert m.check_layers(opened(tmp_path, {"a": torch.ones(2)})) == {}
    assert m.check_layers(opened(tmp_path, {"a": torch.ones(2)}, {"a": {"format": "mine"}}), ["mine"])


CASES = [
    (
        "nvfp4",
        {"a.weight": torch.zeros(48, 256).to(torch.int8)},
        {},
        r"a.weight must be uint8 \[N, K\] for nvfp4, got int8",
    ),
    ("nvfp4", {"a.weight": torch.zeros(48, 255).to(torch.uint8)}, {}, "not in multiples of 16 x 8 for nvfp4"),
    ("nvfp4", {"a.weight_scale": None}, {}, "layer a is nvfp4 and lacks the tensor a.weight_scale"),
    ("nvfp4", {"a.weight_scale_2": None}, {}, "lacks the tensor a.weight_scale_2"),
    (
        "nvfp4",
        {"a.weight_scale_2": torch.ones(2)},
        {},
        r"a.weight_scale_2 must be float32 \[\] or \[1\] for nvfp4, got",
    ),
    ("nvfp4", {"a.weight_scale": torch.ones(48, 32).to(m.E4M3)}, {}, r"must be float8_e4m3fn \[128, 32\] for nvfp4"),
    (
        "nvfp4",
        {"a.weight_scale": torch.full((128, 32), 127).to(torch.uint8)},
        {},
        "the scales a.weight_scale .* not all",
    ),
    ("mxfp8", {"a.weight_scale": torch.ones(128, 16)}, {}, r"got float32 \[128, 16\]"),
    ("float8_e4m3fn", {"a.weight": torch.zeros(4, 4)}, {}, r"a.weight must be float8_e4m3fn .* got float32 \[4, 4\]"),
    ("float8_e4m3fn", {"a.weight_scale": torch.ones(48)}, {}, r"a.weight_scale must be float32 \[\] or \[1\]"),
    ("float8_e5m2", {"a.weight": None}, {}, "layer a as float8_e5m2, and it has no tensor a.weight"),
    ("int8_tensorwise", {"a.weight_scale": torch.ones(47, 1)}, {}, r"\[48\] or \[48, 1\] for int8_tensorwise"),
    (
        "int8_tensorwise",
        {"a.weight": torch.zeros(48).to(torch.int8)},
        {},
        r"\[N, K\] for int8_tensorwise, got int8 \[48\]",
    ),
    (
        "int8_tensorwise",
        {},
        {"convrot": True, "convrot_groupsize": 100},
        "has 512 inputs and is rotated in groups of 100",
    ),
    ("int8_tensorwise", {}, {"params": {"convrot": True, "convrot_groupsize": "x"}}, "rotated in groups of 'x'"),
    ("convrot_w4a4", {}, {"convrot_groupsize": 0}, "has 512 inputs and is rotated in groups of 0"),
    ("convrot_w4a4", {"a.weight": torch.zeros(48, 255).to(torch.int8)}, {}, "not in multiples of 1 x 128"),
    ("nvfp4", {}, {"format": "nvfp5"}, "layer a has the format 'nvfp5'; known are float8_e4m3fn"),
    ("nvfp4", {}, {"format": None}, "layer a has the format None"),
]


@pytest.mark.parametrize(("kind", "change", "settings", "sentence"), CASES)
def test_layers_that_do_not_fit(quantized, tmp_path, kind, change, settings, sentence):
    tensors = {name: t for name, t in (quantized[kind] | change).items() if t is not None}
    for given in ({"layers": {"a": {"format": kind} | settings}}, {"quant": {"format": kind} | settings}):
        with pytest.raises(ValueError, match=f"^w.safetensors cannot be read: .*{sentence}"):
            m.check_layers(opened(tmp_path, tensors, **given))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"quant": b"{"}, "tensor a.comfy_quant is not JSON"),
        ({"quant": b"\xff\xfe"}, "tensor a.comfy_quant is not JSON"),
        ({"quant": b"[]"}, "tensor a.comfy_quant is JSON of a list"),
        ({"quant": b"[" * 60_000}, "tensor a.comfy_quant is not JSON"),
        ({"quant": b" " * 70_000}, r"tensor a.comfy_quant \[70000\] is not a layer's settings"),
        ({"layers": ["a"]}, "its _quantization_metadata names no layers"),
        ({"layers": {"a": "nvfp4"}}, "its _quantization_metadata names no layers"),
    ],
)
def test_settings_that_are_none(tmp_path, given, sentence):
    with pytest.raises(ValueError, match=f"^w.safetensors cannot be read: {sentence}"):
        m.check_layers(opened(tmp_path, {"b": torch.ones(1)}, **given))
