"""The product of a packed layer is that of the layer as it was made, however its input is prepared."""

from types import SimpleNamespace

import pytest
import torch

from tessera.methods.quant.formats import FORMATS
from tessera.methods.quant.layer import quantize_layer
from tessera.methods.quant.product import multiply, prepared, restored
from tessera.methods.quant.rotation import KINDS

N, K = 96, 256
PAIRS = [(name, kind) for name in ("tlq4", "int4_g64", "int8_row") for kind in FORMATS[name].activations]


def layer_of(rotate: str, activations: str, format: str = "tlq4", smooth: bool = False):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator)
    statistics = None
    if smooth or rotate == "zigzag_hadamard":
        from tessera.methods.quant.calibration import LayerStatistics

        statistics = LayerStatistics(K, 64)
        statistics.add(torch.randn(128, K, generator=generator) * torch.rand(K, generator=generator).mul(4).exp())
    layer = quantize_layer(
        weight, format, activations, None, rotate, (0.5,) if smooth else (), statistics, 16
    )  # fmt: skip
    turn = layer.rotation
    params = SimpleNamespace(
        smooth=layer.smooth, rotation=turn.kind, block=turn.block, signs=turn.signs, permutation=turn.permutation,
        activation=layer.activations, name=format,
    )  # fmt: skip
    return layer, params


@pytest.mark.parametrize("rotate", KINDS)
@pytest.mark.parametrize("format, activations", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_layers_own(rotate, activations, format, dtype):
    layer, params = layer_of(rotate, activations, format)
    x = torch.randn(3, 5, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(2)).to(dtype)
    found, wanted = multiply(x, layer.packed, bias, params), layer(x, bias)
    assert found.dtype == dtype and found.shape == (3, 5, N)
    off = (found.float() - wanted.float()).norm() / wanted.float().norm()
    # codes on the edge of two values may fall to either side in bf16
    assert off < (2e-2 if dtype == torch.bfloat16 else 1e-3 if activations != "none" else 1e-5)


@pytest.mark.parametrize("rotate", KINDS)
def test_the_restored_weight_multiplies_the_original_input(rotate):
    layer, params = layer_of(rotate, "none", smooth=True)
    from tessera.kernels.quant.packed import decode

    x = torch.randn(7, K, generator=torch.Generator().manual_seed(1))
    whole = restored(decode(layer.packed), params)
    torch.testing.assert_close(whole, layer.weight(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x @ whole.T, prepared(x, params) @ decode(layer.packed).T, rtol=1e-4, atol=1e-3)
