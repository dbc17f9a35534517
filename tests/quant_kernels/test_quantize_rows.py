import pytest
import torch

from tessera.kernels.quant import quantize_rows as m
from tessera.kernels.quant.rotate import rotate

FORMATS = list(m.MOST)
SERVE = pytest.mark.parametrize("serve", [m.launch, m.reference], ids=["kernel", "reference"])


def inputs(k, device, dtype=torch.float32, rows=5):
    """Strided rows with outliers; multiplier, permutation, signs."""
    x = torch.randn(rows, 2, k, device=device)[:, 1]
    x[:, k // 2] *= 40
    signs = torch.randint(0, 2, (k,), device=device).to(dtype) * 2 - 1
    return x.to(dtype), torch.rand(k, device=device) + 0.5, torch.randperm(k, device=device), signs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("k", "given", "block", "kind"),
    [(100, "", 1, "regular"), (1300, "mp", 4, "regular"), (3072, "mps", 256, "regular"), (96, "s", 32, "sylvester")],
    ids=str,
)
def test_kernel_gives_the_codes_of_the_reference(k, given, block, kind, format, dtype, device):
    x, *rest = inputs(k, device, dtype)
    rest = [t if letter in given else None for letter, t in zip("mps", rest, strict=True)]
    codes, scale = m.launch(x, format, *rest, block, kind)
    want, wanted = m.reference(x, format, *rest, block, kind)
    assert codes.dtype == want.dtype and codes.is_contiguous() and scale.dtype == torch.float32
    assert torch.equal(codes.view(torch.uint8), want.view(torch.uint8)) and torch.equal(scale, wanted)


@SERVE
@pytest.mark.parametrize(("format", "bound"), [("int8", 0.5 / 127), ("int4", 0.5 / 7), ("fp8_e4m3", 2**-4)])
def test_error_bounds(format, bound, serve, device):
    x, multiplier, permutation, signs = inputs(192, device)
    want = rotate((x * multiplier)[:, permutation], signs, 64)
    codes, scale = serve(x, format, multiplier, permutation, signs, 64)
    got, most = codes.float() * scale[:, None], want.abs().amax(1, keepdim=True)
    limit = bound * most if format != "fp8_e4m3" else bound * want.abs() + most / 448 * 2**-10
    assert ((got - want).abs() <= limit * (1 + 1e-5)).all()
    assert torch.allclose(codes.float().abs().amax(1), torch.full((5,), m.MOST[format], device=device))


@SERVE
@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_zeros_and_of_the_smallest_numbers(format, serve, device):
    x = torch.zeros(4, 48, device=device)
    x[1], x[2, 3], x[3] = 1e-45, -1e-38, 2.0
    codes, scale = serve(x, format, None, None, None, 16)
    got = codes.float() * scale[:, None]
    assert scale.isfinite().all() and got.isfinite().all() and (got[:2] == 0).all() and got[3].norm() > 1
    assert (1.0 / scale).isfinite().all()


@SERVE
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")
def test_not_a_number_shows_in_the_scale(serve, device):
    x = torch.randn(3, 2100, device=device)
    x[1, 2000], x[2, 7] = torch.nan, torch.inf
    for format in FORMATS:
        codes, scale = serve(x, format)
        assert scale.isfinite().tolist() == [True, False, False] and scale[1].isnan() and (codes[1:].float() == 0).all()


def test_every_fp8_value_and_the_middle_between_two(device):
    """The integer arithmetic rounds as torch does, subnormal numbers included."""
    values = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles, step = (values[1:] + values[:-1]) / 2, 1 + 2.0**-20
    x = torch.cat([values, middles, middles * step, middles / step])
    x = torch.cat([x, -x])[None].to(device)
    codes, scale = m.launch(x, "fp8_e4m3")
    assert scale.item() == 1 and torch.equal(codes.float(), x.to(torch.float8_e4m3fn).float())


def test_shapes(device):
    x = torch.randn(2, 3, 64, device=device)
    codes, scale = m.launch(x, "int8")
    assert codes.shape == (6, 64) and scale.shape == (6,)
    assert m.launch(x[:0], "int8")[0].shape == (0, 64) and m.launch(x[0, 0], "int4")[1].shape == (1,)
    assert torch.equal(m.launch(x.double(), "int8")[0], codes)
    wide = torch.randn(1, 8192, device=device)
    assert torch.equal(m.launch(wide, "int8", block=8192, kind="sylvester")[0],
                       m.reference(wide, "int8", block=8192, kind="sylvester")[0])  # fmt: skip


def test_custom_op(device):
    x, *rest = inputs(64, device)
    torch.library.opcheck(m.quantize_rows, (x, "fp8_e4m3", *rest, 16))


@SERVE
def test_mismatches_are_named(serve, device):
    x, multiplier, permutation, signs = inputs(64, device)
    for given, words in [
        (("int3",), "int3"),
        (("int8", multiplier[1:]), r"64 columns, and the multiplier is \[63\]"),
        (("int8", None, permutation[1:]), r"the permutation is \[63\]"),
        (("int8", None, permutation.float()), "float32"),
        (("int8", None, None, signs[1:]), r"the signs are \[63\]"),
        (("int8", None, None, None, 256), "Blocks of 256"),
    ]:
        with pytest.raises(ValueError, match=words):
            serve(x, *given)
    with pytest.raises(ValueError, match="int32"):
        serve(x.int(), "int8")


def test_example(device):
    codes, scale = m.launch(*m.example(2, device, torch.bfloat16))
    assert codes.abs().max() == 127 and scale.isfinite().all()
