"""Quantize Model on tiny models: what it writes, what it loads again, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nodes_helper import Job, error, model_of, run_node
from quantized_helper import LAYER, folder, loaded, lora, quantized, with_lora  # noqa: F401 - a fixture

import comfy.model_management  # isort: skip
import comfy.sd  # isort: skip

from tessera.methods.files.header import read_header
from tessera.methods.quant.formats import FORMATS
from tessera.nodes.loaders.quantize_model import QuantizeModel
from tessera.nodes.measure.quantization_report import QuantizationReport
from tessera.patching import quantize as m
from tessera.patching.quant_layer import Asked, made
from tessera.patching.quant_layout import is_packed

pytestmark = pytest.mark.usefixtures("folder")
NEAR = {"tlq4": 0.12, "tlq3": 0.25, "int4_g64": 0.15, "int8_row": 0.02, "fp8_e4m3": 0.1, "nvfp4": 0.2, "mxfp8": 0.1,
        "svdquant_int4": 0.15}  # fmt: skip
TESTS = Path(__file__).resolve().parents[1]
STOCK = ("fp8_e4m3", "nvfp4", "mxfp8")


def short(spec, **more):
    return Job(spec, **{"steps": 2, "cfg": 1.0, **more})


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_written_and_loads_again(format, folder):  # noqa: F811
    model, made, spec, report = quantized("flux", format)
    want, got = short(spec)(model), short(spec)(made)
    assert 0 < error(got, want) < NEAR[format]
    assert torch.equal(short(spec)(loaded("flux.safetensors")), got)
    assert report.startswith("flux.safetensors: 20 layers quantized, 28 left as they are")
    assert [p.name for p in folder.iterdir()] == ["flux.safetensors"], "nothing is left behind"
    if format in STOCK:
        stock = comfy.sd.load_diffusion_model(str(folder / "flux.safetensors"))
        assert torch.equal(short(spec)(stock), got), "core's own loader draws the same"
    else:
        with pytest.raises(Exception, match="tessera"):
            comfy.sd.load_diffusion_model(str(folder / "flux.safetensors"))


@pytest.mark.parametrize("name", ["wan_meta", "sd3", "ltxv_meta", "hunyuan_video", "cogvideox", "wan_ar"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_other_architectures(name, dtype):
    model, made, spec, _ = quantized(name, "int8_row", dtype)
    assert type(made.model) is type(model.model)
    assert error(short(spec)(made).float(), short(spec)(model).float()) < 0.03
    assert torch.equal(short(spec)(loaded(f"{name}.safetensors")), short(spec)(made)) or dtype == "bf16"


@pytest.mark.parametrize("activations", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("rotation", ["none", "hadamard_regular", "hadamard_random"])
def test_activations_and_rotations(activations, rotation):
    model, made, spec, _ = quantized("flux", "int4_g64", activations=activations, rotation=rotation)
    assert error(short(spec)(made), short(spec)(model)) < (0.4 if activations == "int4" else 0.2)
    assert torch.equal(short(spec)(loaded("flux.safetensors")), short(spec)(made))
    params = made.get_model_object(f"diffusion_model.{LAYER['flux']}.weight")._params
    assert (params.activation, params.rotation) == (activations, rotation)


@pytest.mark.parametrize("format", STOCK)
def test_a_layer_of_zeros_in_cores_formats(format):
    done = made(torch.zeros(64, 64), Asked(format), None)
    assert done.error == 0 and all(t.float().isfinite().all() for t in done.tensors.values())
    with pytest.raises(ValueError, match="not finite"):
        made(torch.full((64, 64), torch.nan), Asked(format), None)


def test_a_refused_weight_is_named():
    model, _ = model_of("flux")
    patch = lora(model, LAYER["flux"], size=float("inf"))
    with pytest.raises(ValueError, match=f"^{LAYER['flux']}: The weight .* not finite"):
        run_node(QuantizeModel, model=with_lora(model, patch), format="mxfp8", filename="x")


def test_loras_are_baked_in():
    model, spec = model_of("flux")
    patched = with_lora(model, lora(model, LAYER["flux"]))
    made, _ = run_node(QuantizeModel, model=patched, format="int8_row", filename="baked")
    assert error(short(spec)(made), short(spec)(patched)) < 0.02 < error(short(spec)(made), short(spec)(model))
    assert not made.patches


def test_a_lora_that_a_run_left_in_the_weights(folder):  # noqa: F811
    """ComfyUI adds it to the weights that all clones share, and takes it out before the next run only."""
    model, spec = model_of("flux")
    patched = with_lora(model, lora(model, LAYER["flux"]))
    plain, want = short(spec)(model), short(spec)(patched)
    made, _ = run_node(QuantizeModel, model=model, format="int8_row", filename="plain")
    assert error(short(spec)(made), plain) < 0.02
    short(spec)(patched)
    baked, _ = run_node(QuantizeModel, model=patched, format="int8_row", filename="baked")
    _, rows = run_node(QuantizationReport, model=made, plain=model)
    assert error(short(spec)(baked), want) < 0.02
    assert max(row["error"] for row in json.loads(rows)) < 1e-3
    with pytest.raises(ValueError, match="holds something else"):
        run_node(QuantizeModel, model=model, format="int8_row", filename="baked", existing="reuse")
    with pytest.raises(ValueError, match="cannot be told to hold the LoRAs"):
        run_node(QuantizeModel, model=patched, format="int8_row", filename="baked", existing="reuse")


def test_what_was_set_before_stays():
    from nodes_helper import kinds, taylor

    model, spec = model_of("wan_meta")
    made, _ = run_node(QuantizeModel, model=taylor(model), format="int8_row", filename="cached")
    Job(spec)(made)
    assert "p" in kinds(made)


def test_existing_files(folder):  # noqa: F811
    model, made, spec, _ = quantized("flux")
    before = (folder / "flux.safetensors").read_bytes()
    with pytest.raises(ValueError, match="flux.safetensors exists already. Choose another filename"):
        run_node(QuantizeModel, model=model, format="tlq4", filename="flux")
    same, report = run_node(QuantizeModel, model=model, format="tlq4", filename="flux", existing="reuse")
    assert "it is used" in report and torch.equal(short(spec)(same), short(spec)(made))
    with pytest.raises(ValueError, match="holds something else already"):
        run_node(QuantizeModel, model=model, format="int8_row", filename="flux", existing="reuse")
    assert (folder / "flux.safetensors").read_bytes() == before


def test_an_interrupt_leaves_nothing(folder, monkeypatch):  # noqa: F811
    model, _ = model_of("flux")
    quantized("flux", "int8_row")
    before = (folder / "flux.safetensors").read_bytes()
    calls, made = [], m.made

    def stopped(*args):
        calls.append(1)
        if len(calls) == 3:
            comfy.model_management.interrupt_current_processing()
        return made(*args)

    monkeypatch.setattr(m, "made", stopped)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run_node(QuantizeModel, model=model, format="int8_row", filename="flux", existing="replace")
    assert [p.name for p in folder.iterdir()] == ["flux.safetensors"] and len(calls) == 3
    assert (folder / "flux.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "inputs, sentence",
    [
        ({"filename": "../x"}, "without a folder"),
        ({"filename": ""}, "without a folder"),
        ({"exclude": "("}, "is no regular expression"),
        ({"exclude": "."}, "found no layer to quantize"),
        ({"format": "nvfp4", "rotation": "hadamard_regular"}, "knows no hadamard_regular"),
        ({"format": "int8_row", "activations": "int4"}, "takes activations none or int8, not int4"),
        ({"format": "tlq4", "group": 48}, "groups of 16 or 32 or 64 or 128 or 256, not 48"),
    ],
)
def test_what_is_refused(inputs, sentence, folder):  # noqa: F811
    model, _ = model_of("flux")
    with pytest.raises(ValueError, match=sentence):
        run_node(QuantizeModel, model=model, **{"filename": "x", **inputs})
    assert not list(folder.iterdir())


def test_a_quantized_model_is_refused():
    _, made, _, _ = quantized("flux")
    with pytest.raises(ValueError, match="quantized already .* Load it in full precision"):
        run_node(QuantizeModel, model=made, filename="twice")


def test_the_users_own_list_of_layers(folder):  # noqa: F811
    _, made, _, _ = quantized("flux", exclude=r"^(?!double_blocks\.0\.img_mlp)")
    packed = [n for n, p in made.model.diffusion_model.named_parameters() if is_packed(p.data)]
    assert packed == ["double_blocks.0.img_mlp.0.weight", "double_blocks.0.img_mlp.2.weight"]
    told = read_header(folder / "flux.safetensors")
    assert json.loads(told.metadata["tessera_quantization"])["exclude"].startswith("^(?!double")


def test_in_another_process_it_is_the_same(folder):  # noqa: F811
    """The file alone carries all: rotation by random signs, smoothing, table, branch."""
    _, made, spec, _ = quantized("flux", "svdquant_int4", activations="int8", rotation="hadamard_random")
    want = short(spec)(made)
    torch.save(want, folder / "want.pt")
    script = (
        "import sys, torch\n"
        "import conftest\n"
        "from nodes_helper import Job, model_of\n"
        "from tessera.patching.quant_load import load\n"
        f"model = load({str(folder / 'flux.safetensors')!r})\n"
        "got = Job(model_of('flux')[1], steps=2, cfg=1.0)(model)\n"
        f"assert torch.equal(got, torch.load({str(folder / 'want.pt')!r})), 'differs'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=TESTS, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
