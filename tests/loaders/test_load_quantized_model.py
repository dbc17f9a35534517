"""Load Quantized Model on files of other programs: GGUF and nunchaku's releases, against the dense models they stand for."""

import contextlib
import functools
import os

import pytest
import torch
from loading_helper import KINDS, WIDE, NunchakuFile, dense_model, write_gguf
from nodes_helper import Job, error, run_node
from quantized_helper import folder, loaded, quantized  # noqa: F401 - a fixture

import comfy.model_detection  # isort: skip
import folder_paths  # isort: skip
from safetensors.torch import load_file, save_file  # isort: skip

from tessera.nodes.loaders import load_quantized_model as node
from tessera.patching.quant_layout import is_packed
from tessera.patching.quant_load import load
from tessera.patching.quant_parts import NAME as PARTS

pytestmark = pytest.mark.usefixtures("folder")


def short(name, **more):
    return Job(WIDE.get(name, name) if isinstance(name, str) else name, steps=2, cfg=1.0, **more)


def packed_bytes(model) -> tuple[int, int]:
    """(bytes of the packed weights with their scales, weights in them)."""
    found = [p.data for p in model.model.diffusion_model.parameters() if is_packed(p.data)]
    held = [t.nbytes for p in found for t in p.layout_cls.get_plain_tensors(p)]
    return sum(held), sum(p.numel() for p in found)


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_of_gguf(kind, folder):  # noqa: F811
    dense = write_gguf(folder / "w.gguf", "flux", (kind,))
    model, want = loaded("w.gguf"), dense_model(dense)
    assert error(short("flux")(model), short("flux")(want)) < 1e-4
    held, count = packed_bytes(model)
    bits = {"Q4_0": 4.5, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625, "Q8_0": 8.5}[kind]
    assert count > 3e6 and held == count * bits / 8, "weights stay as they lie in the file"
    plain = 4 * (sum(t.numel() for t in dense.values()) - count)
    assert model.model_size() < held + plain + 1e5  # the list of sigmas


@pytest.mark.parametrize("name, dtype, most", [("wan", "fp32", 1e-4), ("wan", "bf16", 2e-2), ("sd3", "fp32", 1e-4)])
def test_other_models_in_mixed_types(name, dtype, most, folder):  # noqa: F811
    dense = write_gguf(folder / "w.gguf", name, KINDS, ("F32", "F16", "BF16"), prefix="model.diffusion_model.")
    model, want = loaded("w.gguf"), dense_model(dense)
    if dtype == "bf16":
        model.set_model_compute_dtype(torch.bfloat16)
        want.set_model_compute_dtype(torch.bfloat16)
    assert error(short(name)(model), short(name)(want)) < most


def test_a_tensor_that_was_reshaped_for_its_blocks(folder):  # noqa: F811
    """comfy.gguf.orig_shape: such a weight is decoded, since its rows are not those of the blocks."""
    import gguf

    dense = write_gguf(folder / "w.gguf", "flux")
    model = loaded("w.gguf")
    writer = gguf.GGUFWriter(str(folder / "x.gguf"), "flux")
    for key, tensor in dense.items():
        if key == "img_in.weight":  # [256, 64]
            data = gguf.quantize(tensor.view(64, 256).numpy(), gguf.GGMLQuantizationType.Q8_0)
            writer.add_array("comfy.gguf.orig_shape." + key, [256, 64])
            writer.add_tensor(key, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(key, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert 0 < error(short("flux")(loaded("x.gguf")), short("flux")(model)) < 0.02


def test_the_list_of_files(folder, tmp_path_factory):  # noqa: F811
    (folder / "sub").mkdir()
    dense = write_gguf(folder / "sub" / "a.gguf", "flux")
    save_file({"x": torch.zeros(1)}, folder / "b.safetensors")
    (folder / "c.txt").write_text("no model")
    outside = tmp_path_factory.mktemp("outside") / "d.gguf"
    (folder / "sub" / "a.gguf").rename(outside)
    os.link(outside, folder / "sub" / "a.gguf")
    os.symlink(outside, folder / "e.gguf")
    assert node.files() == ["b.safetensors", "e.gguf", os.path.join("sub", "a.gguf")]
    schema = {i.id: i for i in node.LoadQuantizedModel.define_schema().inputs}
    assert schema["file"].options == node.files()
    model = loaded(os.path.join("sub", "a.gguf"))
    assert error(short("flux")(model), short("flux")(dense_model(dense))) < 1e-4
    with pytest.raises(ValueError, match=r"e.gguf cannot be read: it lies outside of ComfyUI's model folders"):
        loaded("e.gguf")
    for name in ("missing.gguf", "../outside.gguf", "c.txt", str(outside), ""):
        with pytest.raises(ValueError, match="There is no .* in models/diffusion_models. Put it there"):
            run_node(node.LoadQuantizedModel, file=name)
    with pytest.raises(ValueError, match="b.safetensors: no diffusion transformer"):
        loaded("b.safetensors")


@pytest.fixture
def detected(release, monkeypatch):
    """Detection knows Qwen-Image at its full size only."""
    known = comfy.model_detection.detect_unet_config

    def small(*args, **kwargs):
        return known(*args, **kwargs) | ({} if release.name == "flux" else release.spec.arguments)

    monkeypatch.setattr(comfy.model_detection, "detect_unet_config", small)


@contextlib.contextmanager
def compared(model, release, worst: dict):
    """Each layer's output meanwhile, with comfy_kitchen's eager functions on the same input."""
    reference, handles = release.eager_model().model.diffusion_model, []

    def hook(name, want, module, args, out):
        worst[name] = max(worst.get(name, 0), error(out, want.forward(args[0])))

    for name in release.parts:
        check = functools.partial(hook, name, reference.get_submodule(name))
        handles.append(model.model.diffusion_model.get_submodule(name).register_forward_hook(check))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module", params=["flux", "qwen_image"])
def release(request):
    torch.manual_seed(0)
    return NunchakuFile(request.param)


def test_nunchakus_releases(release, folder, detected):  # noqa: F811
    """Equal to comfy_kitchen's functions layer by layer, and near the dense weights, apart from int4 activations."""
    release.write(folder / "svdq.safetensors")
    made = loaded("svdq.safetensors")
    job, worst = short(release.spec), {}
    with compared(made, release, worst):
        got = job(made)
    assert worst.keys() == release.parts.keys() and max(worst.values()) < 1e-6
    assert error(got, job(release.eager_model())) < 1e-4
    assert 1e-3 < error(got, job(release.dense_model())) < 0.3
    linears = {
        n for n, p in made.model.diffusion_model.named_parameters() if getattr(p.data, "_layout_cls", "") == PARTS
    }
    assert linears == {f"{name}.weight" for name in release.parts}
    saved = made.model.diffusion_model.state_dict()
    save_file({k: t.contiguous() for k, t in saved.items()}, folder / "again.safetensors")
    again = loaded("again.safetensors")
    assert all(torch.equal(t, saved[k]) for k, t in again.model.diffusion_model.state_dict().items())
    assert error(job(again), got) < 1e-6


def test_every_mode_of_autograd(folder):  # noqa: F811
    """torch takes linear apart where gradients may be wanted: the layers must not become dense ones by that."""
    torch.manual_seed(0)
    release = NunchakuFile("flux")
    release.write(folder / "svdq.safetensors")
    made = loaded("svdq.safetensors").model.diffusion_model.single_blocks[0].linear2
    x = torch.randn(3, 640)
    want, dense = made(x), x @ release.dense["single_blocks.0.linear2.weight"].T
    assert error(want, dense + release.dense["single_blocks.0.linear2.bias"]) > 1e-3
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert torch.equal(made(x), want)
            assert torch.equal(torch.nn.functional.linear(x, made.weight, made.bias), want)
            if mode is not torch.inference_mode:  # which has no views of weights that were loaded outside of it
                assert torch.equal(x @ made.weight.t() + made.bias, want)


def test_nunchaku_in_bf16(release, folder, detected):  # noqa: F811
    release.write(folder / "svdq.safetensors")
    made, worst = loaded("svdq.safetensors"), {}
    made.set_model_compute_dtype(torch.bfloat16)
    with compared(made, release, worst):
        short(release.spec)(made)
    assert worst.keys() == release.parts.keys() and max(worst.values()) < 2e-2


def test_the_factory_of_deep_clones(folder):  # noqa: F811
    write_gguf(folder / "w.gguf", "flux")
    model = loaded("w.gguf")
    function, arguments = model.cached_patcher_init
    assert function is load and arguments == (str(folder / "w.gguf"), (str(folder),))
    want = short("flux")(model)
    other = model.clone(force_deepcopy=True)
    assert other.model is not model.model and torch.equal(short("flux")(other), want)


def test_dense_files_load_as_ever(folder):  # noqa: F811
    from tiny_models import write_checkpoint

    write_checkpoint(WIDE["flux"], folder / "plain.safetensors")
    model = loaded("plain.safetensors")
    want = dense_model(load_file(folder / "plain.safetensors"))
    assert torch.equal(short("flux")(model), short("flux")(want))
    assert folder_paths.get_filename_list("diffusion_models") == ["plain.safetensors"]
