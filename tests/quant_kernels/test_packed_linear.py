import pytest
import torch
from quant_packed_helper import parts, random_packed
from torch.nn.functional import linear

from tessera.kernels import _config
from tessera.kernels.quant import packed
from tessera.kernels.quant import packed_linear as m

ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CASES = [(codec, 37, 256, 64, rows) for codec, rows in zip(packed.CODECS, (1, 5, 19, 17, 1, 18, 3, 20), strict=True)]
CASES += [("table4", 5, 100, 8, 1), ("table4", 70, 200, 40, 67), ("table3", 34, 90, 24, 2), ("int8", 3, 100, 100, 17)]


def inputs(case, dtype, device):
    codec, n, columns, group, rows = case
    weight = random_packed(codec, n, columns, group, device)
    wide = torch.randn(rows, 2, columns, device=device).to(dtype)
    return wide[:, 1], weight, torch.randn(n, device=device).to(dtype)


def exact(x, weight, bias=None):
    return linear(x.double(), packed.decode(weight, x.dtype).double(), None if bias is None else bias.double())


def call(serve, x, weight, bias=None, mode=m.AUTO):
    data, scale, table, *rest = parts(weight)
    return serve(x, data, scale, table, bias, *rest, mode)


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused_kernel(case, dtype, device, error):
    x, weight, bias = inputs(case, dtype, device)
    got = call(m.launch, x, weight, bias, m.FUSED)
    assert got.dtype == dtype and got.is_contiguous() and error(got, exact(x, weight, bias)) < ERROR[dtype]


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case, dtype, device, error):
    x, weight, bias = inputs(case, dtype, device)
    got = call(m.reference, x, weight, bias)
    assert got.dtype == dtype and got.is_contiguous() and error(got, exact(x, weight, bias)) < ERROR[dtype]


@pytest.mark.parametrize("rows", [1, 17])
def test_split_sums(rows, device, error):
    """Many steps and one tile of rows: several programs share each sum, and the last has fewer steps."""
    x, weight, bias = inputs(("table4", 33, 64 * 23, 64, rows), torch.float32, device)
    entry = {("packed_linear", 32, m.width("table4", rows)): {"tile": [16, 32], "warps": 4, "stages": 1}}
    with _config.forced(entry):
        assert error(call(m.launch, x, weight, bias, m.FUSED), exact(x, weight, bias)) < 1e-5
        assert error(call(m.launch, x, weight, None, m.FUSED), exact(x, weight)) < 1e-5


def test_modes_agree(device, error):
    x, weight, bias = inputs(("q4_k", 40, 512, 64, 66), torch.float32, device)
    want = exact(x, weight, bias)
    for mode in (m.AUTO, m.FUSED, m.SCRATCH):
        assert error(call(m.launch, x, weight, bias, mode), want) < 1e-5


def test_reference_decodes_a_few_rows_at_a_time(monkeypatch, error):
    x, weight, bias = inputs(("table4", 37, 256, 64, 5), torch.float32, "cpu")
    held, decode = [], packed.decode

    def watched(part, dtype):
        held.append(len(part.data))
        return decode(part, dtype)

    monkeypatch.setattr(m, "decode", watched)
    monkeypatch.setattr(m, "CPU_BYTES", 10 * 256 * 4)
    assert error(call(m.reference, x, weight, bias), exact(x, weight, bias)) < 1e-5
    assert held == [10, 10, 10, 7]


def test_shapes(device):
    x, weight, bias = inputs(("table4", 6, 128, 64, 4), torch.float32, device)
    for serve in (m.launch, m.reference):
        assert call(serve, x.view(2, 2, 128), weight).shape == (2, 2, 6)
        assert call(serve, x[:0], weight, bias).shape == (0, 6)
        assert call(serve, x[0], weight).shape == (6,)
        assert call(serve, x.double(), weight, mode=m.FUSED).dtype == torch.float64


def test_gradients(device, error):
    x, weight, bias = inputs(("table4", 37, 128, 64, 6), torch.float32, device)
    x, bias, g = x.detach().requires_grad_(), bias.requires_grad_(), torch.randn(6, 37, device=device)
    got = torch.autograd.grad(call(m.packed_linear, x, weight, bias), (x, bias), g)
    w = packed.decode(weight)
    assert error(got[0], g @ w) < 1e-5 and error(got[1], g.sum(0)) < 1e-5


def test_custom_op(device):
    for case in (CASES[0], CASES[5]):
        x, weight, bias = inputs(case, torch.float32, device)
        data, scale, table, *rest = parts(weight)
        torch.library.opcheck(m.packed_linear, (x.detach().requires_grad_(), data, scale, table, bias, *rest))


@pytest.mark.parametrize("serve", [m.launch, m.reference], ids=["kernel", "reference"])
def test_mismatches_are_named(serve, device):
    x, weight, bias = inputs(CASES[0], torch.float32, device)
    with pytest.raises(ValueError, match=r"has 256 columns, and its input is \[1, 255\]"):
        call(serve, x[:, 1:], weight)
    with pytest.raises(ValueError, match=r"has 37 rows, and its bias is \[36\]"):
        call(serve, x, weight, bias[1:])
    with pytest.raises(ValueError, match="got 3"):
        call(serve, x, weight, mode=3)


def test_example(device):
    assert m.packed_linear(*m.example(2, device, torch.bfloat16)).isfinite().all()
