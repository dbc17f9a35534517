"""Quantized layers under torch.compile and in every mode of autograd."""

import pytest
import torch
from nodes_helper import error
from quantized_files import FORMATS, files, opened  # noqa: F401 - a fixture
from quantized_helper import LAYER, lora, with_lora

import comfy.model_management  # isort: skip


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind, backend", [("tlq4", "eager"), ("svdquant", "aot_eager"), ("gguf", "aot_eager")])
def test_a_layer(files, kind, backend):  # noqa: F811
    """One graph, without a break."""
    model = opened(files, kind)
    model = with_lora(model, lora(model, LAYER["flux"]))
    comfy.model_management.load_models_gpu([model])
    layer = model.model.diffusion_model.get_submodule(LAYER["flux"])
    x = torch.randn(2, 5, layer.in_features)
    want = layer(x)
    linear = torch.nn.functional.linear
    whole = torch.compile(lambda x: linear(x, layer.weight, layer.bias), backend=backend, fullgraph=True)
    assert error(whole(x), want) < 1e-5
    assert error(torch.compile(layer, backend=backend)(x), want) < 1e-5


@pytest.mark.parametrize("kind", ["tlq4", "nunchaku"])
def test_a_block(files, kind):  # noqa: F811
    """The graph breaks at core's attention, which asks for the free memory, and at nunchaku's layers, which make
    comfy_kitchen's tensors; packed layers of ours break nothing."""
    model = opened(files, kind)
    comfy.model_management.load_models_gpu([model])
    block = model.model.diffusion_model.double_blocks[0]
    generator = torch.Generator().manual_seed(0)
    image, text, vec = (torch.randn(1, *s, 128, generator=generator) for s in ((12,), (4,), ()))
    call = {"img": image, "txt": text, "vec": vec, "pe": torch.randn(1, 1, 16, 64, 2, 2, generator=generator)}
    with torch.no_grad():
        want = block(**call)
        got = torch.compile(block, backend="eager")(**call)
        told = torch._dynamo.explain(block)(**call) if kind == "tlq4" else None
    assert max(error(g, w) for g, w in zip(got, want, strict=True)) < (1e-5 if kind == "tlq4" else 0.1)
    for reason in told.break_reasons if told else ():
        assert any("get_free_memory" in frame.name for frame in reason.user_stack), reason.reason


@pytest.mark.parametrize("kind", FORMATS)
def test_modes_of_autograd(files, kind):  # noqa: F811
    model = opened(files, kind)
    layer = model.model.diffusion_model.get_submodule(LAYER["flux"])
    x = torch.randn(2, 5, layer.in_features)
    want = layer(x)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert error(layer(x), want) < 1e-6
            assert error(torch.nn.functional.linear(x, layer.weight, layer.bias), want) < 1e-6
    assert error(x[0] @ layer.weight.t() + layer.bias, want[0]) < 1e-6
    assert error(torch.addmm(layer.bias, x[0], layer.weight.t()), want[0]) < 1e-6


@pytest.mark.parametrize("kind", ["tlq4", "svdquant", "gguf"])
def test_gradients_of_the_input(files, kind):  # noqa: F811
    layer = opened(files, kind).model.diffusion_model.get_submodule(LAYER["flux"])
    x = torch.randn(3, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    dense = layer.weight.to(dtype=torch.float32).dequantize()
    assert error(x.grad, dense.sum(0).expand_as(x)) < 1e-5
