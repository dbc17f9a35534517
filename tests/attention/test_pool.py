import inspect
import math

import pytest
import torch

from tessera.kernels.attention import pool as m

SHAPES = [  # B, H, N, D, block, unit, tokens
    (1, 1, 1, 8, 16, 1, None),  # one token
    (2, 3, 70, 72, 16, 1, None),  # ragged tail
    (1, 2, 64, 64, 16, 1, 64),  # whole blocks
    (1, 2, 37, 40, 8, 16, 577),  # rows that stand for 16 tokens, the last for 1
    (2, 1, 32, 160, 16, 4, 126),  # whole blocks whose last row is short, channels in two programs
    (1, 1, 300, 16, 200, 1, None),  # a block larger than the kernel's tile, no power of two
]
ERROR = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 8e-3}  # the interpreter truncates to bf16
SERVES = [m.launch, m.reference]
NAMES = ["kernel", "reference"]


def make(shape, device, dtype=torch.float32):
    """Token-major, as ComfyUI's views are; far from zero, so that a tail filled up with zeros shows."""
    b, h, n, d = shape[:4]
    return (3 + torch.randn(b, n, h, d, device=device)).to(dtype).transpose(1, 2)


def exact(x, block, unit, tokens, mean=True):
    """One block at a time, one token at a time: each row repeated as often as it counts."""
    tokens = x.shape[2] * unit if tokens is None else tokens
    repeated = x.double().repeat_interleave(unit, 2)[:, :, :tokens]
    parts = repeated.split(block * unit, 2)
    return torch.stack([part.mean(2) if mean else part.sum(2) for part in parts], 2)


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_mean_over_real_tokens(shape, dtype, serve, device, error):
    x = make(shape, device, dtype)
    got = serve(x, *shape[4:])
    assert got.dtype == dtype and got.is_contiguous() and got.shape[2] == math.ceil(shape[2] / shape[4])
    assert error(got, exact(x, *shape[4:])) < ERROR[dtype]


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sum_in_another_dtype(shape, serve, device, error):
    x = make(shape, device, torch.float16)
    got = serve(x, *shape[4:], False, torch.float32)
    assert got.dtype == torch.float32 and error(got, exact(x, *shape[4:], False)) < 1e-6


def test_accumulates_in_fp32(device):
    """4096 times 1.001 in fp16: a sum in fp16 stops growing at 2048."""
    x = torch.full((1, 1, 4096, 1), 1.001, dtype=torch.float16, device=device)
    assert torch.equal(m.reference(x, 4096), x[:, :, :1]) and torch.equal(m.launch(x, 4096), x[:, :, :1])


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_level_after_level_is_the_mean_of_the_tokens(serve, device, error):
    x = make((1, 2, 300, 24), device)
    first = serve(x, 16)
    second = serve(first, 16, 16, 300)
    assert second.shape[2] == 2 and error(second, exact(x, 256, 1, None)) < 1e-6


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_strides(serve, device, error):
    """Packed projection, channels that are not neighbours, one head for all."""
    packed = torch.randn(2, 50, 3, 2, 24, device=device).permute(2, 0, 3, 1, 4)
    for x in (
        packed[1],
        packed[0].transpose(2, 3).contiguous().transpose(2, 3),
        packed[2][:, :1].expand(-1, 3, -1, -1),
    ):
        assert error(serve(x, 16), exact(x, 16, 1, None)) < 1e-6


@pytest.mark.parametrize("mean", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("backward", [m.launch_backward, m.reference_backward], ids=NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient(shape, backward, mean, device, error):
    x = make(shape, device).double().requires_grad_()
    want = exact(x, *shape[4:], mean)
    grad = torch.randn_like(want)
    want.backward(grad)
    block, unit, tokens = shape[4:]
    total = shape[2] * unit if tokens is None else tokens
    strided = grad.float().transpose(1, 2).contiguous().transpose(1, 2)
    assert error(backward(strided, shape[2], block, unit, total, mean, torch.float32), x.grad) < 1e-6


def test_autograd_in_double(device):
    x = make((1, 2, 19, 3), device).double().requires_grad_()
    for arguments in ((4,), (4, 3, 55), (4, 1, None, False)):
        assert torch.autograd.gradcheck(lambda x, a=arguments: m.pool(x, *a), x)


def test_double_stays_double(device):
    x = make(SHAPES[1], device).double()
    got = m.launch(x, 16)
    assert got.dtype == torch.float64 and (got - exact(x, 16, 1, None)).abs().max() < 1e-13


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3]], ids=str)
def test_custom_op(shape, device):
    x = make(shape, device).requires_grad_()
    torch.library.opcheck(m.pool, (x, *shape[4:]))
    torch.library.opcheck(m.pool, (x, *shape[4:], False, torch.float64))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((0,), "at least 1"), ((4, 0), "at least 1"), ((4, 2, 18), "stand for 19 to 20"), ((4, 2, 21), "tokens=21")],
)
def test_sizes_that_do_not_fit_are_refused(arguments, words, device):
    for serve in SERVES:
        with pytest.raises(ValueError, match=words):
            serve(torch.zeros(1, 1, 10, 4, device=device), *arguments)
        with pytest.raises(ValueError, match="at least one row"):
            serve(torch.zeros(1, 1, 0, 4, device=device), 4)


def test_example_and_specs(device, error):
    x, block = m.example(130, device, torch.float16)
    assert error(m.pool(x, block), exact(x, block, 1, None)) < 5e-4
    for spec in m.aot_specs():
        kernel = getattr(m, spec["kernel"])
        assert {*spec["args"], *spec["const"]} == set(inspect.signature(kernel.fn).parameters)
