import pytest
import torch
from quant_packed_helper import parts, random_packed

from tessera.kernels.quant import dequantize as m
from tessera.kernels.quant import packed

CASES = [(codec, 37, 512, 64) for codec in packed.CODECS]
CASES += [("table4", 5, 100, 8), ("table4", 33, 200, 40), ("table4", 1, 70, 256), ("table3", 34, 90, 24)]
CASES += [("table3", 3, 130, 128), ("int8", 3, 100, 100), ("int8", 1, 7, 4), ("table4", 2, 96, 32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_is_exact(case, dtype, device, error):
    codec, rows, columns, group = case
    weight = random_packed(codec, rows, columns, group, device)
    got, want = m.launch(*parts(weight), dtype), packed.decode(weight, dtype)
    assert (got.dtype, got.stride(), got.shape) == (dtype, want.stride(), (rows, columns))
    if dtype == torch.bfloat16:  # the interpreter truncates to bf16
        assert error(got, want) < 5e-3
    else:
        assert torch.equal(got, want)


def test_strided_bytes(device):
    weight = random_packed("table4", 9, 128, 64, device)
    wide = torch.stack([weight.data, weight.data], dim=-1)[..., 0]
    assert not wide.is_contiguous()
    got = m.launch(wide, weight.scale, *parts(weight)[2:], torch.float32)
    assert torch.equal(got, packed.decode(weight))


def test_double_and_no_rows(device):
    weight = random_packed("q6_k", 3, 256, device=device)
    data, *rest = parts(weight)
    assert torch.equal(m.launch(data, *rest, torch.float64), packed.decode(weight, torch.float64))
    assert m.launch(data[:0], *rest, torch.float32).shape == (0, 256)


@pytest.mark.parametrize("codec", ["table3", "int8", "q5_k"])
def test_custom_op(codec, device):
    torch.library.opcheck(m.dequantize, (*parts(random_packed(codec, 5, 256, device=device)), torch.bfloat16))


def test_mismatches_are_named(device):
    data, scale, table, *rest = parts(random_packed("table4", 5, 256, device=device))
    with pytest.raises(ValueError, match=r"scales \[5, 4\], got float32 \[5, 3\]"):
        m.launch(data, scale[:, :3], table, *rest, torch.float32)


def test_example(device):
    assert m.dequantize(*m.example(2, device, torch.bfloat16)).isfinite().all()
