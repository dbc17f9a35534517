"""Files of Quantize Model, changed in ways that a header does not show: refused, file and tensor named."""

import json

import pytest
import torch
from nodes_helper import run_node
from quantized_helper import LAYER, folder, loaded, quantized  # noqa: F401 - a fixture
from safetensors import safe_open
from safetensors.torch import save_file

from tessera.nodes.measure.quantization_report import QuantizationReport

pytestmark = pytest.mark.usefixtures("folder")
L = LAYER["flux"]
W = f"{L}.weight"


@pytest.fixture
def parts(folder):  # noqa: F811
    """format, options -> (tensors of the file, its metadata)."""

    def read(format="svdquant_int4", **options):
        quantized("flux", format, **options)
        with safe_open(folder / "flux.safetensors", "pt") as file:
            return {key: file.get_tensor(key) for key in sorted(file.keys())}, file.metadata()

    return read


@pytest.fixture
def refused(folder):  # noqa: F811
    def check(tensors, sentence, metadata=None):
        save_file(tensors, str(folder / "x.safetensors"), metadata=metadata)
        with pytest.raises(ValueError, match=sentence) as found:
            loaded("x.safetensors")
        assert "x.safetensors" in str(found.value)

    return check


def told(tensors, **more):
    found = json.loads(bytes(tensors[f"{L}.comfy_quant"].tolist())) | more
    return {f"{L}.comfy_quant": torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)}


def without(tensors, *names):
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(names)}


def test_parts_of_a_packed_layer(parts, refused):
    tensors, metadata = parts(activations="int8", rotation="hadamard_random")
    refused(without(tensors, f"{W}_up"), f"{L}: The low-rank branch has up None", metadata)
    refused(tensors | {f"{W}_up": tensors[f"{W}_up"][:, :3].contiguous()}, f"{L}: The low-rank branch", metadata)
    refused(tensors | {f"{W}_signs": 0 * tensors[f"{W}_signs"]}, f"{L}: weight_signs are not all 1 or -1", metadata)
    for name, dtype in (("scale", torch.float8_e4m3fn), ("table", torch.bool), ("up", torch.int32)):
        refused(tensors | {f"{W}_{name}": tensors[f"{W}_{name}"].to(dtype)}, f"{L}: weight_{name} is ", metadata)
    rows = {key: tensors[key][:64].contiguous() for key in (W, f"{W}_scale", f"{W}_up")}
    refused(tensors | rows, f"{W} is .64, 128. in the file where the model has .512, 128.", metadata)


def test_a_group_longer_than_the_row(parts, refused):
    """Padding each row to the group would take all memory."""
    tensors, metadata = parts("int8_row")
    refused(tensors | told(tensors, group=(1 << 24) - 1), "groups of 16777215 are longer than a row of 128", metadata)


@pytest.mark.parametrize("format", ["int8_row", "fp8_e4m3", "mxfp8"])
def test_codes_that_nothing_explains(format, parts, refused):
    tensors, metadata = parts(format)
    refused(without(tensors, f"{L}.comfy_quant"), f"and neither {L}.comfy_quant nor the metadata says", metadata)
    bare = without(tensors, f"{L}.comfy_quant", f"{L}.weight_scale")
    if format == "int8_row":
        refused(bare | {W: bare[W].view(torch.int8)}, f"{W} is int8 .512, 128., and neither", metadata)


def test_what_the_model_needs(parts, refused):
    """ComfyUI would leave uninitialised memory in a missing weight, and stop at a missing block."""
    tensors, metadata = parts("tlq4")
    refused(without(tensors, f"{L}.bias"), f"lacks the tensors {L}.bias", metadata)
    refused(without(tensors, "single_blocks.0."), "single_blocks.1.linear1.bias.* behind one that is missing", metadata)
    last = "final_layer.linear.weight"
    refused(tensors | {last: tensors[last].t().contiguous()}, f"{last} is .*128, 64. .*where", metadata)
    refused(tensors | {"img_in.weight": tensors["img_in.weight"].flatten()}, "cannot tell a model", metadata)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "null", '{"transformer": 3}'])
def test_settings_that_are_none(text, parts, refused):
    tensors, metadata = parts("tlq4")
    refused(tensors, "metadata `config` is no JSON object", metadata | {"config": text})


@pytest.mark.parametrize("layers", [2 * 10**9, -2])
def test_settings_of_more_layers_than_tensors(layers, parts, refused):
    tensors, metadata = parts("tlq4")
    config = json.dumps({"transformer": {"num_layers": layers}})
    refused(tensors, f"tells of num_layers {layers} for", metadata | {"config": config})


def test_what_is_whole_still_loads(parts, folder):  # noqa: F811
    tensors, metadata = parts("tlq4")
    save_file(tensors | {"what.is.this": torch.zeros(3)}, str(folder / "x.safetensors"), metadata=metadata)
    found = loaded("x.safetensors")
    assert run_node(QuantizationReport, model=found)[0].startswith("20 of ")
