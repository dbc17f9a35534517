"""What another clone has put in place of parts of the shared network, and has left there, is seen by no node and no run."""

import comfy.model_management
import pytest
import torch
from easycontrol_nodes import applied
from lora_helper import loras, stack, tensors  # noqa: F401 - a fixture
from nodes_helper import Job, conds, facts, model_of, run_node, taylor
from quantized_helper import folder  # noqa: F401 - a fixture
from tiny_models import SPECS, build

from tessera import archs
from tessera.methods.files.header import read_header
from tessera.nodes.loaders.quantize_model import QuantizeModel
from tessera.nodes.measure.quantization_report import QuantizationReport
from tessera.nodes.sampling.rf_edit import RfEdit
from tessera.nodes.sampling.rf_invert import RfInvert
from tessera.patching.blocks import block_path, positions
from tessera.patching.sizes import fingerprint


def compiled(model):
    """With every block compiled, as packs do that leave object patches."""
    made, network = model.clone(), model.model.diffusion_model
    for block in positions(archs.find(network), network):
        path = block_path(network, block.spec, block.index)
        made.add_object_patch(path, torch.compile(made.get_model_object(path), backend="eager"))
    return made


def on_the_network(model, spec):
    """Keeps a clone with compiled blocks loaded."""
    other = compiled(model)
    Job(spec, steps=1)(other)
    assert any("_orig_mod" in key for key in model.model.state_dict())
    return other


@pytest.mark.parametrize("order", ["ours first", "compiled first", "compiled elsewhere"])
def test_wrapped_forwards_beside_compiled_blocks(order):
    """Run for run: ComfyUI takes two patches off, one below the other, in an order that leaves one of them."""
    model, spec = build("cogvideox"), SPECS["cogvideox"]  # a network of its own, whatever stays on it
    job, plain = Job(spec, steps=5), model
    want, off = job(taylor(model, interval=2)), job(model)
    if order == "compiled elsewhere":
        other = on_the_network(model, spec)
        made = taylor(model, interval=2)
    else:
        made = taylor(compiled(model), interval=2) if order == "compiled first" else compiled(taylor(model, interval=2))
    for turn in (made, made, plain, made):
        assert torch.equal(job(turn), want if turn is made else off)
        assert turn is plain or facts(made)["forecast"] > 0
    if order == "compiled elsewhere":
        assert torch.equal(job(other), off) and torch.equal(job(taylor(other, interval=2)), want)
    comfy.model_management.unload_all_models()
    assert torch.equal(job(made), want)


def test_modules_are_told_where_compiled_blocks_were_left():
    model, spec = model_of("wan")
    job = Job(spec, steps=5)
    want = job(taylor(model, level="module"))
    kept = on_the_network(model, spec)
    made = taylor(model, level="module")
    assert torch.equal(job(made), want) and facts(made)["forecast"] > 0 and kept is not made


def test_a_condition_is_in_the_space_of_its_own_model():
    model, spec = model_of("flux")
    want = Job(spec, steps=2)(applied(model))

    class Other(type(model.model.latent_format)):
        def process_in(self, latent):
            return 2 * super().process_in(latent)

    other = model.clone()
    other.add_object_patch("latent_format", Other())
    Job(spec, steps=1)(other)
    assert torch.equal(Job(spec, steps=2)(applied(model)), want)
    Job(spec, steps=1)(model)
    first = Job(spec, steps=2)(applied(other))
    assert torch.equal(Job(spec, steps=2)(applied(other)), first) and not torch.equal(first, want)


def test_a_lora_on_biases_leaves_the_print_of_the_model():
    model, spec = model_of("flux")
    want = fingerprint(model)
    other, key = model.clone(), "diffusion_model.img_in.bias"
    other.add_patches({key: ("diff", (torch.ones_like(model.get_model_object(key)),))})
    Job(spec, steps=1)(other)
    assert fingerprint(model) == fingerprint(other) == want


def test_lora_and_quantization_name_the_model_s_own_layers(loras, folder):  # noqa: F811
    model, spec = model_of("flux")
    names = {
        "lora_1": loras("a.safetensors", tensors("flux", "core")),
        "lora_2": loras("b.safetensors", tensors("flux", "core", 1)),
    }
    want = stack(model, names)[0].patches.keys()
    run_node(QuantizeModel, model=model, format="int8_row", filename="first")
    told = run_node(QuantizationReport, model=model)[0]
    others = [on_the_network(model, spec)]
    assert stack(model, names)[0].patches.keys() == want
    others.append(on_the_network(model, spec))
    run_node(QuantizeModel, model=model, format="int8_row", filename="second")
    assert (
        read_header(folder / "second.safetensors").tensors.keys()
        == read_header(folder / "first.safetensors").tensors.keys()
    )
    others.append(on_the_network(model, spec))
    assert run_node(QuantizationReport, model=model)[0] == told


def test_shared_features_under_torch_compile():
    model, spec = model_of("flux")
    latent, sigmas = {"samples": torch.randn(spec.latent)}, torch.tensor([0.6, 0.3, 0.0])

    def edited(plain):
        given = {"positive": conds(spec)[0], "latent": latent, "sigmas": sigmas, "record_steps": 1}
        noise, bank = run_node(RfInvert, model=plain, **given).args[:2]
        job = Job(spec, sigmas=sigmas, latent=latent["samples"], noise=noise.generate_noise(latent), cfg=1.0)
        return job(run_node(RfEdit, model=plain, bank=bank, inject_steps=1)[0])

    other, whole = model.clone(), torch.compile(model.get_model_object("diffusion_model"), backend="eager")
    other.add_object_patch("diffusion_model", whole)
    assert (edited(other) - edited(model)).abs().max() < 1e-5
