"""Nunchaku's tiles: what a packer written lane by lane makes comes back, and comfy_kitchen computes with it."""

import nunchaku_helper as h
import pytest
import torch

from tessera.kernels.quant.packed import decode
from tessera.methods.files import nunchaku_layout as m

SIZES = [(128, 128), (384, 256), (256, 640)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rank", [16, 48])
def test_svd_round_trip(size, rank):
    parts = h.svd_parts(*size, rank)
    layer = m.unpack_svd("x", h.svd_packed(parts))
    assert torch.equal(layer.codes(), parts["codes"])
    for name in ("scale", "smooth", "down", "up", "bias"):
        assert torch.equal(getattr(layer, name), parts[name]), name
    weight, bias = layer.dense()
    assert torch.equal(weight.double(), h.svd_dense(parts)) and torch.equal(bias, parts["bias"].float())
    packed = decode(layer.packed())
    assert torch.equal(packed, parts["codes"].float() * parts["scale"].float().t().repeat_interleave(64, dim=1))


def test_layers_without_branch_or_bias():
    file = h.svd_packed(h.svd_parts(128, 128))
    layer = m.unpack_svd("x", {key: file[key] for key in ("qweight", "wscales", "smooth_factor")})
    assert layer.down.shape == layer.up.shape == (128, 0) and layer.bias is None
    assert layer.dense()[1].abs().max() == 0 and layer.rows(3, 9).bias is None


def kitchen(layer: m.SvdLinear, x: torch.Tensor) -> torch.Tensor:
    """The layer as comfy_kitchen's layout runs it, eagerly."""
    from comfy_kitchen.tensor.base import QuantizedTensor
    from comfy_kitchen.tensor.svdquant_w4a4 import TensorCoreSVDQuantW4A4Layout as Layout

    size = layer.qweight.shape[0], 2 * layer.qweight.shape[1]
    params = Layout.Params(
        scale=layer.scale,
        orig_dtype=layer.scale.dtype,
        orig_shape=size,
        proj_down=layer.down,
        proj_up=layer.up,
        smooth_factor=layer.smooth,
        act_unsigned=layer.unsigned,
    )
    weight = QuantizedTensor(layer.qweight, "TensorCoreSVDQuantW4A4Layout", params)
    with torch.inference_mode():
        return torch.nn.functional.linear(x, weight, layer.bias)


@pytest.mark.parametrize("unsigned", [False, True])
def test_kitchen_takes_it(host, error, unsigned):
    """Against the formula with activations on the kitchen's own grid, where their quantization is exact."""
    parts = h.svd_parts(256, 128, dtype=torch.float32)
    layer = m.unpack_svd("x", h.svd_packed(parts), unsigned)
    q = torch.randint(0, 16, (5, 128)) if unsigned else torch.randint(-7, 8, (5, 128))
    q[:, ::64] = 15 if unsigned else 7  # the largest of each group of 64
    x = q * layer.smooth / 8 - (m.SHIFT if unsigned else 0)
    weight, bias = layer.dense()
    want = x.double() @ weight.double().t() + bias.double()
    assert error(kitchen(layer, x), want) < 1e-5


@pytest.mark.parametrize("splits", [1, 3, 6])
@pytest.mark.parametrize("k", [64, 192])
def test_awq_round_trip(host, error, splits, k):
    from comfy_kitchen.backends.eager.awq import gemv_awq_w4a16

    parts = h.awq_parts(24 * splits, k)
    layer = m.unpack_awq("x", h.awq_packed(parts, splits), splits)
    weight, bias = layer.dense()
    assert torch.equal(weight.double(), h.awq_dense(parts)) and torch.equal(bias, parts["bias"].float())
    x = torch.randn(3, k)
    got = gemv_awq_w4a16(x, layer.qweight, layer.scale.float(), layer.zeros.float(), bias)
    assert error(got, x.double() @ h.awq_dense(parts).t() + bias) < 1e-5


def test_awq_groups_are_padded():
    """The converter fills the groups up to a multiple of 16."""
    file = h.awq_packed(h.awq_parts(8, 128))
    padded = file | {key: torch.cat((file[key], torch.zeros(14, 8).bfloat16())) for key in ("wscales", "wzeros")}
    for got, want in zip(m.unpack_awq("x", padded).dense(), m.unpack_awq("x", file).dense(), strict=True):
        assert torch.equal(got, want)


def layers(*sizes, unsigned=False):
    return [m.unpack_svd("x", h.svd_packed(h.svd_parts(*size, dtype=torch.float32)), unsigned) for size in sizes]


def test_join_by_columns():
    """FLUX's linear2: attention's and the MLP's columns; the shift of the second is folded into the bias."""
    first, (second,) = layers((128, 128))[0], layers((128, 256), unsigned=True)
    with pytest.raises(ValueError, match="call unshifted"):
        m.join([first, second], "columns")
    joined = m.join([first, second.unshifted()], "columns")
    (a, bias_a), (b, bias_b), (weight, bias) = first.dense(), second.dense(), joined.dense()
    assert torch.equal(weight, torch.cat((a, b), dim=1)) and torch.allclose(bias, bias_a + bias_b, atol=1e-6)
    assert (second.dense()[1] - second.bias).abs().max() > 0.1 and first.unshifted() is first
    x = torch.randn(2, 384)
    want = kitchen_free(first, x[:, :128]) + kitchen_free(second, x[:, 128:])
    assert torch.allclose(kitchen_free(joined, x), want, atol=1e-4)


def kitchen_free(layer: m.SvdLinear, x: torch.Tensor) -> torch.Tensor:
    """The formula, activations unquantized."""
    scale = layer.scale.t().repeat_interleave(64, dim=1)
    shifted = (x + (m.SHIFT if layer.unsigned else 0)) / layer.smooth
    return shifted @ (layer.codes() * scale).t() + x @ layer.down @ layer.up.t() + layer.bias


def test_join_by_rows():
    """FLUX's linear1 and a qkv cut in three."""
    first, second = layers((128, 128), (256, 128))
    with pytest.raises(ValueError, match="different smoothing"):
        m.join([first, second], "rows")
    second = m.replace(second, smooth=first.smooth, bias=None)
    joined = m.join([first, second], "rows")
    assert joined.down.shape == (128, 32) and joined.up.shape == (384, 32)
    for got, a, b in zip(joined.dense(), first.dense(), second.dense(), strict=True):
        assert torch.equal(got, torch.cat((a, b)))
    thirds = [second.rows(i, i + 64) for i in (0, 64, 128)]
    assert m.join(thirds, "rows").down.shape == (128, 16)
    assert torch.equal(m.join(thirds, "rows").dense()[0], second.dense()[0][:192])


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("qweight", torch.zeros(128, 64), r"x.qweight must be int8 .* got float32 \[128, 64\]"),
        ("qweight", torch.zeros(64, 64, dtype=torch.int8), r"got int8 \[64, 64\]"),
        ("wscales", torch.zeros(2, 64), r"x.wscales must be floating point \[2, 128\], got float32 \[2, 64\]"),
        ("wscales", torch.zeros(8, 128).to(torch.float8_e4m3fn), "x holds NVFP4 weights"),
        ("smooth_factor", torch.zeros(64), r"x.smooth_factor must be floating point \[128\]"),
        ("smooth_factor", torch.zeros(128), "x.smooth_factor .* holds zeros or NaN"),
        ("smooth_factor", torch.full((128,), float("nan")), "holds zeros or NaN"),
        ("bias", torch.zeros(1), r"x.bias must be floating point \[128\]"),
        ("proj_down", torch.zeros(128, 24), r"x needs proj_down \[128, R\]"),
        ("proj_up", torch.zeros(128, 32), r"got bfloat16 \[128, 16\] and float32 \[128, 32\]"),
        ("proj_up", None, "x has one of proj_down and proj_up"),
    ],
)
def test_svd_layers_that_do_not_fit(key, value, sentence):
    file = h.svd_packed(h.svd_parts(128, 128)) | {key: value}
    with pytest.raises(ValueError, match=sentence):
        m.unpack_svd("x", {name: tensor for name, tensor in file.items() if tensor is not None})


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("qweight", torch.zeros(2, 64, dtype=torch.int8), r"x.qweight must be int32 .* got int8"),
        ("qweight", torch.zeros(2, 40, dtype=torch.int32), "K in chunks of 64"),
        ("wscales", torch.zeros(3, 8), r"x.wscales must be \[2, 8\], got float32 \[3, 8\]"),
        ("wzeros", torch.zeros(2, 9), r"x.wzeros must be \[2, 8\]"),
        ("bias", torch.zeros(9), r"x.bias must be floating point \[8\]"),
    ],
)
def test_awq_layers_that_do_not_fit(key, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        m.unpack_awq("x", h.awq_packed(h.awq_parts(8, 128)) | {key: value})
