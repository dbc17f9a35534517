import pytest
import torch
from quant_packed_helper import parts, random_packed

from tessera.kernels import _config
from tessera.kernels.quant import packed, quantize_rows, scaled_linear, scaled_packed_linear

m, p = scaled_linear, scaled_packed_linear
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
SIZES = [(1, 64, 5), (17, 200, 33), (70, 96, 66)]  # rows, columns K, rows of the weight
SERVE = pytest.mark.parametrize("name", ["kernel", "reference"])
FP8 = torch.float8_e4m3fn


def served(module, name):
    return module.launch if name == "kernel" else module.reference


def codes(rows, k, dtype, device):
    """Strided."""
    wide = torch.randint(-127, 128, (rows, 2, k), device=device)
    return (wide.to(torch.int8) if dtype == torch.int8 else (wide / 16).to(FP8))[:, 1]


def inputs(size, dtype, device):
    rows, k, n = size
    return codes(rows, k, dtype, device), torch.rand(rows, device=device), codes(n, k, dtype, device), torch.rand(n, device=device)  # fmt: skip


def exact(x, x_scale, w, w_scale, bias=None):
    y = (x.double() @ w.double().t()) * x_scale.double()[:, None] * w_scale.double()
    return y if bias is None else y + bias.double()


@SERVE
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("codes", [torch.int8, FP8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaled(dtype, codes, size, name, device, error):
    given, bias = inputs(size, codes, device), torch.randn(size[2], device=device).to(dtype)
    got = served(m, name)(*given, bias, dtype)
    assert got.dtype == dtype and got.is_contiguous() and error(got, exact(*given, bias)) < DTYPES[dtype]
    assert error(served(m, name)(*given, None, dtype), exact(*given)) < DTYPES[dtype]


@SERVE
def test_integer_sums_are_exact(name, device):
    """Sums beyond 2^24, where fp32 has gaps of 2, come out as the nearest fp32."""
    x, w = (torch.full((n, 4099), 127, dtype=torch.int8, device=device) for n in (3, 2))
    x[1, 0], x[2] = 126, -127
    one = torch.ones(3, device=device)
    got = served(m, name)(x, one, w, one[:2], None, torch.float32)
    assert torch.equal(got.double(), (x.double() @ w.double().t()).float().double())


def test_integer_sums_of_devices_without_an_integer_product():
    x, w = codes(9, 3000, torch.int8, "cpu"), torch.full((7, 3000), -128, dtype=torch.int8)
    x[0] = -128
    assert torch.equal(m.pieces(x, w), torch._int_mm(x, w.t())) and torch.equal(
        m.pieces(x, w).long(), x.long() @ w.long().t()
    )


@SERVE
@pytest.mark.parametrize("format", ["int8", "fp8_e4m3"])
def test_against_the_plain_layer(format, name, device, error):
    x, w = torch.randn(19, 320, device=device), torch.randn(24, 320, device=device)
    (xq, xs), (wq, ws) = quantize_rows.reference(x, format), quantize_rows.reference(w, format)
    assert error(served(m, name)(xq, xs, wq, ws, None, torch.float32), x @ w.t()) < (0.02 if format == "int8" else 0.05)


def integers(codec, n, columns, group, device):
    weight = random_packed(codec, n, columns, group, device)
    if weight.table is None:
        return weight
    table = torch.randint(-128, 128, weight.table.shape, device=device).float()
    return packed.Packed(codec, columns, weight.data, weight.scale, table, group)


PACKED = [("table4", 17, 192, 64, 1), ("table4", 33, 100, 8, 18), ("table4", 5, 200, 40, 3), ("table3", 34, 128, 64, 5)]
PACKED += [("int8", 9, 130, 130, 17), ("int8", 9, 130, 48, 2), ("table4", 70, 300, 256, 40)]


@SERVE
@pytest.mark.parametrize("case", PACKED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed(dtype, case, name, device, error):
    codec, n, columns, group, rows = case
    weight, x = integers(codec, n, columns, group, device), codes(rows, columns, torch.int8, device)
    data, scale, table, *rest = parts(weight)
    x_scale, bias = torch.rand(rows, device=device), torch.randn(n, device=device).to(dtype)
    got = served(p, name)(x, x_scale, data, scale, table, bias, *rest, dtype)
    want = exact(x, x_scale, packed.decode(weight), torch.ones(n, device=device), bias)
    assert got.dtype == dtype and got.is_contiguous() and error(got, want) < DTYPES[dtype]


def test_packed_integer_sums_are_exact(device):
    """One group, scales of one: the result is the integer itself, in the kernel as in the reference."""
    x, weight = codes(20, 64, torch.int8, device), integers("table4", 12, 64, 64, device)
    data, _, table, *rest = parts(weight)
    one = torch.ones(20, device=device)
    given = (x, one, data, one[:12, None].contiguous(), table, None, *rest, torch.float32)
    want = x.long() @ table[packed.unpack_codes(data, "table4", 64).long()].long().t()
    assert torch.equal(p.launch(*given).long(), want) and torch.equal(p.reference(*given).long(), want)


def test_custom_ops(device):
    given = inputs(SIZES[1], torch.int8, device)
    torch.library.opcheck(m.scaled_linear, (*given, torch.randn(33, device=device), torch.bfloat16))
    data, scale, table, *rest = parts(integers("table4", 9, 128, 64, device))
    given = (codes(4, 128, torch.int8, device), torch.rand(4, device=device), data, scale, table, None, *rest)
    torch.library.opcheck(p.scaled_packed_linear, (*given, torch.bfloat16))


def test_no_rows(device):
    x, x_scale, *weight = inputs((3, 64, 5), torch.int8, device)
    assert m.launch(x[:0], x_scale[:0], *weight, None, torch.float32).shape == (0, 5)
    assert m.launch(x, x_scale, *weight, None, torch.float64).dtype == torch.float64


@pytest.mark.parametrize(("name", "able"), [("sm80", False), ("sm86", False), ("sm89", True), ("sm90", True),
                                            ("sm120", True), ("gfx942", False)])  # fmt: skip
def test_fp8_goes_to_the_reference_where_triton_has_none(name, able, device, monkeypatch):
    monkeypatch.setattr(_config, "architecture", lambda device: name)
    assert m.has_fp8(torch.device(device)) == able
    monkeypatch.setattr(m, "reference", lambda *_: "reference")
    got = m.launch(*inputs((2, 32, 3), FP8, device), None, torch.float32)
    assert isinstance(got, str) != able


@SERVE
def test_mismatches_are_named(name, device):
    x, x_scale, w, w_scale = inputs((3, 64, 5), torch.int8, device)
    for given, words in [
        ((x[:, 1:], x_scale, w, w_scale, None), r"\[3, 63\] and \[5, 64\]"),
        ((x, x_scale, w.to(FP8), w_scale, None), "int8 and torch.float8_e4m3fn"),
        ((x, x_scale[1:], w, w_scale, None), r"3 rows of codes, and their scales are \[2\]"),
        ((x, x_scale, w, w_scale[1:], None), r"5 rows, and its scales are \[4\]"),
        ((x, x_scale, w, w_scale, w_scale[1:]), r"5 rows, and its bias is \[4\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            served(m, name)(*given, torch.float32)
    data, scale, table, *rest = parts(integers("table4", 5, 64, 64, device))
    with pytest.raises(ValueError, match="float32"):
        served(p, name)(x.float(), x_scale, data, scale, table, None, *rest, torch.float32)
    with pytest.raises(ValueError, match="q4_k has no integers"):
        served(p, name)(x, x_scale, data, scale, table, None, "q4_k", 64, 64, torch.float32)
    if device == "cpu":
        with pytest.raises(ValueError, match="whole numbers"):
            served(p, name)(x, x_scale, data, scale, table + 0.5, None, *rest, torch.float32)


def test_examples(device):
    assert m.launch(*m.example(2, device, torch.bfloat16)).isfinite().all()
    assert p.scaled_packed_linear(*p.example(2, device, torch.bfloat16)).isfinite().all()
