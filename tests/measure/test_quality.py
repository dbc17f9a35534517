"""PSNR and SSIM against scikit-image's documented definitions, worked out by hand where there is no other oracle."""

import math

import pytest
import torch

from tessera.methods.measure.chart import strip
from tessera.methods.measure.quality import psnr, relative_error, ssim


@pytest.fixture
def image():
    return torch.rand(2, 24, 32, 3, generator=torch.Generator().manual_seed(0))


def test_relative_error():
    a = torch.tensor([3.0, 4.0])
    assert relative_error(a, a) == 0
    assert relative_error(a, torch.tensor([3.0, 4.5])) == pytest.approx(0.1)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(a.bfloat16(), a.bfloat16() * 2) == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"Cannot compare \[2\] with \[3\]"):
        relative_error(a, torch.zeros(3))


def test_relative_error_keeps_what_float32_would_lose():
    a = torch.full((1000,), 1e4)
    assert relative_error(a, a + 1e-2) == pytest.approx(1e-6, rel=0.1)


def test_psnr(image):
    assert psnr(image, image) == math.inf
    assert psnr(torch.zeros(1, 4, 4, 3), torch.full((1, 4, 4, 3), 0.1)) == pytest.approx(20.0, abs=1e-4)
    assert psnr(torch.zeros(1, 4, 4, 3), torch.ones(1, 4, 4, 3)) == pytest.approx(0.0, abs=1e-9)


def test_ssim_of_equal_and_opposite_images(image):
    assert ssim(image, image) == pytest.approx(1.0, abs=1e-6)
    assert ssim(image, 1 - image) < 0
    noisy = [(image + s * torch.randn(image.shape)).clamp(0, 1) for s in (0.02, 0.1, 0.4)]
    scores = [ssim(image, n) for n in noisy]
    assert 1 > scores[0] > scores[1] > scores[2] > -1


def test_ssim_of_constant_images():
    """Without variance only the luminance term is left: (2ab + C1) / (a^2 + b^2 + C1)."""
    a, b = torch.full((1, 16, 16, 3), 0.2), torch.full((1, 16, 16, 3), 0.6)
    assert ssim(a, b) == pytest.approx((2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4), abs=1e-3)


def windowed(a: torch.Tensor, b: torch.Tensor, side: int) -> float:
    """Wang et al. 2004 as loops over windows, in double precision."""
    at = [math.exp(-((i - (side - 1) / 2) ** 2) / (2 * 1.5**2)) for i in range(side)]
    kernel = torch.tensor([[p * q for q in at] for p in at], dtype=torch.float64)
    kernel /= kernel.sum()
    scores = []
    for n in range(a.shape[0]):
        for c in range(a.shape[3]):
            for y in range(a.shape[1] - side + 1):
                for x in range(a.shape[2] - side + 1):
                    p, q = (t[n, y : y + side, x : x + side, c].double() for t in (a, b))
                    mp, mq = (kernel * p).sum(), (kernel * q).sum()
                    vp, vq = (kernel * (p - mp) ** 2).sum(), (kernel * (q - mq) ** 2).sum()
                    cov = (kernel * (p - mp) * (q - mq)).sum()
                    top = (2 * mp * mq + 0.01**2) * (2 * cov + 0.03**2)
                    scores.append(top / ((mp**2 + mq**2 + 0.01**2) * (vp + vq + 0.03**2)))
    return torch.stack(scores).mean().item()


@pytest.mark.parametrize(
    "size, side", [((1, 13, 12, 1), 11), ((2, 11, 11, 3), 11), ((1, 8, 9, 1), 7), ((1, 5, 20, 1), 5)]
)
def test_ssim_window(size, side):
    torch.manual_seed(1)
    a = torch.rand(size)
    b = (a + 0.2 * torch.randn(size)).clamp(0, 1)
    assert ssim(a, b) == pytest.approx(windowed(a, b, side), abs=1e-4)


def test_ssim_refuses_other_sizes(image):
    with pytest.raises(ValueError, match="both need the same size"):
        ssim(image, image[:, :, :-1])


def test_side_by_side(image):
    other = (image + 0.1).clamp(0, 1)
    out = strip([image, other])
    assert out.shape == (2, 24, 96, 3)
    assert torch.equal(out[:, :, :32], image) and torch.equal(out[:, :, 32:64], other)
    assert out[:, :, 64:].max() == pytest.approx(1.0) and out.min() >= 0
    assert strip([image, image])[:, :, 64:].abs().max() == 0
