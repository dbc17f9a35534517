"""Smoothing scales."""

import pytest
import torch

from tessera.methods.quant.smooth import RANGE, smooth_scales


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_follows_the_formula_and_keeps_the_product(alpha, error):
    x, w = torch.randn(60, 32).double() * torch.rand(32).double() * 9, torch.randn(20, 32).double()
    s = smooth_scales(x.abs().amax(0), w, alpha)
    want = x.abs().amax(0) ** alpha / w.abs().amax(0) ** (1 - alpha)
    assert torch.allclose(s.double() / want, (s.double() / want)[:1], rtol=1e-4) and s.log().mean().abs() < 1e-5
    assert error((x / s) @ (w * s).T, x @ w.T) < 1e-5


def test_half_shares_the_outlier():
    amax, w = torch.ones(64), torch.ones(8, 64)
    amax[5] = 100
    s = smooth_scales(amax, w)
    assert s[5] / s[0] == pytest.approx(10, rel=1e-4)


def test_silent_channels_and_empty_columns_get_one_and_extremes_an_end():
    amax, w = torch.ones(16), torch.ones(4, 16)
    amax[1], w[:, 2], amax[3] = 0, 0, 1e30
    s = smooth_scales(amax, w)
    assert s[1] == s[2] == 1 and s.isfinite().all() and s.max() <= RANGE * 1.001 and s.min() >= 1 / RANGE / 1.001
    assert torch.equal(smooth_scales(torch.zeros(16), w), torch.ones(16))
    assert torch.allclose(smooth_scales(amax, w.abs().amax(0)), s)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"needs \[16\] input channels, got \[4\]"):
        smooth_scales(torch.ones(4), torch.ones(3, 16))
    with pytest.raises(ValueError, match="between 0 and 1, got 1.5"):
        smooth_scales(torch.ones(16), torch.ones(3, 16), 1.5)
