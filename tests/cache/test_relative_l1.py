import math

import pytest
import torch

from tessera.kernels.cache import relative_l1 as m

SERVES = [m.launch, m.reference]
NAMES = ["kernel", "reference"]


def exact(a, b):
    return (a.double() - b.double()).abs().mean() / b.double().abs().mean()


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 65, 40), (2, 17001)], ids=str)
def test_equals_the_ratio_of_means(shape, dtype, serve, device):
    a, b = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    got = serve(a, b)
    assert got.shape == () and got.dtype == torch.float32
    assert got.item() == pytest.approx(exact(a, b).item(), rel=2e-6)


def test_many_parts_and_strides(device, monkeypatch):
    monkeypatch.setattr(m, "BLOCK", 16)
    monkeypatch.setattr(m, "STEPS", 2)  # 38 programs, three loads of their sums
    a, b = (torch.randn(30, 40, device=device).t() for _ in range(2))
    want = pytest.approx(exact(a, b).item(), rel=2e-6)
    assert m.launch(a, b).item() == want and m.reference(a, b).item() == want
    assert torch.equal(m.launch(a, b), m.launch(a, b))


def test_reference_chunks_cover_a_long_pair():
    a, b = (torch.randn(2 * m.CPU_CHUNK + 5) for _ in range(2))
    assert m.reference(a, b).item() == pytest.approx(exact(a, b).item(), rel=2e-6)


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_zeros(serve, device):
    a, zero = torch.ones(5, device=device), torch.zeros(5, device=device)
    assert serve(zero, zero).item() == 0 and serve(a, a).item() == 0
    assert serve(a, zero).item() == math.inf and serve(zero, a).item() == 1


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_pairs_of_unlike_dtypes(serve, device):
    a, b = torch.randn(50, device=device), torch.randn(50, device=device).bfloat16()
    assert serve(a, b).item() == pytest.approx(exact(a, b).item(), rel=2e-6)


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_double_stays_double(serve, device):
    a, b = (torch.randn(50, device=device, dtype=torch.float64) for _ in range(2))
    assert serve(a, b).dtype == torch.float64 and serve(a, b).item() == pytest.approx(exact(a, b).item(), rel=1e-14)


def test_custom_op(device):
    torch.library.opcheck(m.relative_l1, tuple(torch.randn(2, 7, 5, device=device)))


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_mismatches_are_named(serve, device):
    a = torch.zeros(2, 3, device=device)
    for pair, words in (((a, a[:1]), r"\[1, 3\]"), ((a[:0], a[:0]), "not empty"), ((a, a.long()), "floating point")):
        with pytest.raises(ValueError, match=words):
            serve(*pair)


def test_example(device):
    a, b = m.example(3, device, torch.bfloat16)
    assert m.launch(a, b).item() == pytest.approx(exact(a, b).item(), rel=1e-5)
