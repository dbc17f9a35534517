"""Rounding of activations and weights, beside the definitions and comfy-kitchen's own."""

import pytest
import torch
from quant_helper import relative_mse, rows

from tessera.kernels.quant.packed import decode
from tessera.methods.quant.formats import FORMATS
from tessera.methods.quant.round_trip import ACTIVATIONS, CORE, PACKED, activations, quantize, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.51 / 127), ("int4", 0.51 / 7), ("fp8", 2**-4 + 1e-3)])
def test_each_token_has_its_own_scale(kind, bound, dtype):
    x = torch.randn(2, 9, 64) * torch.logspace(-6, 3, 9)[:, None]
    x = x.to(dtype)
    near = activations(x, kind)
    peak = x.float().abs().amax(-1, keepdim=True)
    assert near.dtype == dtype and ((near.float() - x.float()).abs() <= (bound + 2**-8) * peak).all()
    assert torch.equal(activations(x[:, :1], kind), near[:, :1])
    levels = (near.float() / peak * {"int8": 127, "int4": 7, "fp8": 448}[kind]).round()
    assert len(levels[0, 4].unique()) > 5 and not activations(torch.zeros(2, 8), kind).any()


def test_none_returns_the_very_tensor_and_others_are_refused():
    x = torch.randn(2, 8)
    assert activations(x, "none") is x and ACTIVATIONS[0] == "none"
    with pytest.raises(ValueError, match="Unknown activations 'int2'"):
        activations(x, "int2")


@pytest.mark.parametrize("format", [*PACKED, *CORE])
def test_errors_and_bits_are_those_told(format):
    w, importance = rows("gauss", 32, 256), torch.rand(256)
    near, fit = weights(w, format, importance=importance)
    assert fit.error == pytest.approx(relative_mse(near, w), rel=1e-3)
    weighed = ((near - w).square() * importance).sum() / (w.square() * importance).sum()
    assert fit.weighted_error == pytest.approx(float(weighed), rel=0.02)
    assert fit.bits == pytest.approx(FORMATS[format].effective_bits(32, 256), abs=0.07)
    if format in PACKED:
        assert torch.equal(decode(quantize(w, format, importance=importance)[0]), near)


def test_the_ranks_of_formats():
    w = rows("gauss", 64, 512)
    errors = {format: weights(w, format)[1].error for format in (*PACKED, *CORE)}
    order = sorted(errors, key=errors.get)
    assert order[0] == "int8_row" and set(order[1:3]) == {"mxfp8", "fp8_e4m3"}
    assert order[3:] == ["tlq4", "nvfp4", "svdquant_int4", "int4_g64", "tlq3"]
    assert errors["nvfp4"] == pytest.approx(0.0091, rel=0.05) and errors["int4_g64"] == pytest.approx(0.0116, rel=0.05)


def test_core_formats_come_back_as_comfy_kitchens():
    kitchen = pytest.importorskip("comfy_kitchen")
    w = rows("student5", 128, 256) * torch.logspace(-3, 1, 128)[:, None]
    whole = w.abs().max() / (448 * 6)
    codes, scales = kitchen.quantize_nvfp4(w, whole)
    theirs = kitchen.dequantize_nvfp4(codes, whole, scales, torch.float32)
    assert torch.allclose(weights(w, "nvfp4")[0], theirs, rtol=1e-5, atol=1e-9)
    codes, scales = kitchen.quantize_mxfp8(w)
    assert torch.allclose(weights(w, "mxfp8")[0], kitchen.dequantize_mxfp8(codes, scales, torch.float32), rtol=1e-5)


def test_nvfp4_errs_by_at_most_its_bound():
    """(1 + 1/16) / 6 of the block's largest magnitude: half the step from 4 to 6, and the rounding of its scale."""
    for seed in range(5):
        w = rows("gauss", 64, 256, seed) * torch.logspace(-3, 1, 64)[:, None]
        blocks, near = w.reshape(64, -1, 16), weights(w, "nvfp4")[0].reshape(64, -1, 16)
        normal = blocks.abs().amax(-1) / 6 >= w.abs().max() / (448 * 6) * 2**-6  # of the E4M3 scales
        assert normal.float().mean() > 0.5
        assert ((near - blocks).abs().amax(-1) / blocks.abs().amax(-1))[normal].max() <= 0.1771


@pytest.mark.parametrize("format", [*PACKED, *CORE, "none"])
def test_zeros_and_odd_widths(format):
    near, fit = weights(torch.zeros(3, 70), format)
    assert near.shape == (3, 70) and not near.any() and fit.error == 0
    w = rows("gauss", 3, 70)
    assert relative_mse(weights(w, format)[0], w) < 0.05


def test_unknown_formats_are_refused():
    with pytest.raises(ValueError, match="Unknown format 'int5'"):
        weights(torch.ones(4, 64), "int5")
    with pytest.raises(ValueError, match="'nvfp4' is not one of our codecs"):
        quantize(torch.ones(4, 64), "nvfp4")
