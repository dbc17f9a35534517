"""Quantized layers as a whole: the parts make the product that the weight says."""

import pytest
import torch
from quant_helper import planted, relative_mse, rows

from tessera.methods.quant.calibration import LayerStatistics
from tessera.methods.quant.layer import quantize_layer
from tessera.methods.quant.round_trip import PACKED

N, K = 96, 256
OUTLIERS = {3: 30.0, 100: 50.0}


@pytest.fixture(scope="module")
def statistics():
    s = LayerStatistics(K)
    s.add(planted(1000, K, OUTLIERS))
    return s


@pytest.mark.parametrize("rotate", ["auto", "none", "hadamard_regular", "hadamard_random", "zigzag_hadamard"])
@pytest.mark.parametrize("format", PACKED)
def test_the_product_is_that_of_the_weight(format, rotate, statistics, error):
    w, x, bias = rows("gauss", N, K), planted(20, K, OUTLIERS, 5), torch.randn(N)
    layer = quantize_layer(w, format, "none", rotate=rotate, statistics=statistics)
    assert rotate == "auto" or layer.rotation.kind in (rotate, "none")
    assert error(layer(x, bias), x @ layer.weight().T + bias) < 1e-4
    assert relative_mse(layer(x), x @ w.T) < (0.06 if format == "tlq3" else 0.012)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("format", PACKED)
def test_rounded_tokens(format, statistics):
    w, x = rows("gauss", N, K), planted(200, K, OUTLIERS, 5)
    errors = {
        kind: relative_mse(quantize_layer(w, format, kind, statistics=statistics)(x), x @ w.T)
        for kind in ("none", "int8")
    }
    assert errors["none"] * 0.9 < errors["int8"] < max(2 * errors["none"], 0.002)


def test_the_branch_takes_its_share(statistics):
    """The error falls with the rank, and all ranks leave only what 16 bit cost."""
    w, x = rows("gauss", N, K) * torch.logspace(0, -1, K), planted(200, K, OUTLIERS, 5)
    errors = []
    for rank in (0, 4, 16, 32, 96):
        layer = quantize_layer(w, "svdquant_int4", "none", statistics=statistics, rank=rank)
        assert (layer.up is None) == (rank == 0) and (rank == 0 or layer.down.shape == (rank, K))
        assert rank == 0 or (layer.up.dtype == torch.bfloat16 and layer.up.shape == (N, rank))
        errors.append(relative_mse(layer(x), x @ w.T))
    assert all(b < a * 1.02 for a, b in zip(errors, errors[1:], strict=False)) and errors[3] < 0.8 * errors[0]
    assert errors[-1] < 2e-4


def test_svdquant_beats_plain_integers_at_four_bits(statistics):
    w, x = rows("gauss", N, K), planted(200, K, OUTLIERS, 5)
    errors = {
        format: relative_mse(quantize_layer(w, format, "int4", statistics=statistics)(x), x @ w.T)
        for format in ("int4_g64", "svdquant_int4")
    }
    assert errors["svdquant_int4"] < 0.8 * errors["int4_g64"]


@pytest.mark.parametrize("format", PACKED)
def test_zeros_and_one_row(format, statistics):
    layer = quantize_layer(torch.zeros(4, K), format, "int8", statistics=statistics)
    assert torch.equal(layer(planted(3, K, {})), torch.zeros(3, 4))
    one = quantize_layer(rows("gauss", 1, K), format, "int8", statistics=statistics)
    assert one(planted(1, K, {})).isfinite().all() and one(torch.zeros(2, 0, K)).shape == (2, 0, 1)


def test_a_rotation_that_does_not_fit_is_left_out():
    for rotate in ("hadamard_regular", "hadamard_random"):
        layer = quantize_layer(rows("gauss", 8, 72), "tlq4", rotate=rotate)
        assert layer.rotation.kind == "none"
        assert quantize_layer(rows("gauss", 8, 96), "tlq4", rotate=rotate).rotation.kind == rotate


def test_without_a_calibration():
    w = rows("gauss", N, K)
    assert quantize_layer(w, "tlq4", "int4").rotation.kind == "hadamard_regular"
    assert quantize_layer(w, "tlq4", "none").rotation.kind == "none"
    layer = quantize_layer(w, "svdquant_int4", "int4", rotate="none")
    assert layer.rotation.kind == "none" and layer.smooth is None and layer.up.shape == (N, 32)


def test_groups_and_half_precision():
    for group in (32, 128):
        assert quantize_layer(rows("gauss", N, K), "tlq4", group=group).packed.scale.shape == (N, K // group)
    layer = quantize_layer(rows("gauss", N, K).bfloat16(), "int8_row", "int8")
    assert layer.packed.scale.shape == (N, 1) and layer.fit.error < 2e-4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"format": "int9"}, "Unknown format 'int9'"),
        ({"format": "nvfp4"}, "nvfp4 is stored by ComfyUI's own layouts"),
        ({"format": "int8_row", "kind": "int4"}, "int8_row takes activations none or int8, not int4"),
        ({"format": "tlq4", "group": 48}, "tlq4 has groups of"),
        ({"format": "tlq4", "rotate": "turn"}, "Unknown rotation 'turn'. Known are auto, none"),
        ({"format": "tlq4", "rotate": "zigzag_hadamard"}, "connect a calibration or choose another"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, words):
    with pytest.raises(ValueError) as error:
        quantize_layer(rows("gauss", 8, K), **arguments)
    assert words in str(error.value)


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        quantize_layer(torch.full((8, K), torch.nan), "tlq4")


@pytest.mark.gpu
def test_on_the_gpu(statistics):
    w, x = rows("gauss", N, K), planted(50, K, OUTLIERS, 5)
    for format in PACKED:
        layer = quantize_layer(w.cuda(), format, "int8", statistics=statistics)
        assert layer(x.cuda()).is_cuda and relative_mse(layer(x.cuda()).cpu(), x @ w.T) < 0.06
