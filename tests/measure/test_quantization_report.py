"""Quantization Report: formats, bits and bytes as they lie in memory, and the path that runs."""

import json

import pytest
import torch
from nodes_helper import model_of, run_node
from quantized_helper import LAYER, folder, quantized  # noqa: F401 - a fixture

from tessera.nodes.measure.quantization_report import QuantizationReport
from tessera.patching import quant_report as m

pytestmark = pytest.mark.usefixtures("folder")


def report(model, **inputs):
    text, rows = run_node(QuantizationReport, model=model, **inputs)
    return text, {row["layer"]: row for row in json.loads(rows)}


@pytest.mark.parametrize(
    "format, bits",
    [("tlq4", 4.25), ("tlq3", 3.25), ("int4_g64", 4.25), ("fp8_e4m3", 8), ("nvfp4", 4.5), ("mxfp8", 8.25)],
)
def test_bits_and_bytes(format, bits):
    plain, made, _, _ = quantized("flux", format)
    text, rows = report(made, plain=plain)
    row, weight = rows[LAYER["flux"]], made.get_model_object(f"diffusion_model.{LAYER['flux']}.weight")
    stored = sum(t.numel() * t.element_size() for t in weight.state_dict().values())
    assert row["bytes"] == stored and row["bits"] == pytest.approx(8 * stored / weight.numel(), abs=1e-3)
    assert row["bits"] == pytest.approx(bits, rel=0.02) and 0 < row["error"] < 0.1
    assert format.partition("_")[0] in row["format"] and row["path"] == "decoded"
    assert ("full precision" if format == "fp8_e4m3" else "CPU") in row["why"]
    assert text.startswith("20 of ") and "not quantized" not in text


def test_a_plain_model():
    model, _ = model_of("flux")
    text, rows = report(model)
    assert text.startswith("0 of ") and {row["path"] for row in rows.values()} == {"dense"}


def test_another_model_beside_it():
    _, made, _, _ = quantized("flux")
    with pytest.raises(ValueError, match="of another architecture"):
        report(made, plain=model_of("wan_meta")[0])


@pytest.mark.parametrize(
    "device, path, words",
    [("cuda", "fused", "less memory, not more speed"), ("cpu", "decoded", "runs the torch reference")],
)
def test_the_path_follows_the_device(monkeypatch, device, path, words):
    """On a GPU: the launchers are registered for it wherever Triton is."""
    _, made, _, _ = quantized("flux")
    monkeypatch.setattr(m, "_device", lambda device: "this GPU")
    weight = made.get_model_object(f"diffusion_model.{LAYER['flux']}.weight")
    row = m.row_of("x", None, weight, torch.device(device))
    assert row.path == path and words in row.why


@pytest.mark.parametrize("format, path", [("int4_g64", "native"), ("int8_row", "native"), ("tlq4", "fused")])
def test_integers_are_multiplied_as_such(monkeypatch, format, path):
    """As methods/quant/product.py does."""
    _, made, _, _ = quantized("flux", format, activations="int8")
    monkeypatch.setattr(m, "_device", lambda device: "this GPU")
    weight = made.get_model_object(f"diffusion_model.{LAYER['flux']}.weight")
    assert m.row_of("x", None, weight, torch.device("cuda")).path == path
