"""AdaIN Color Fix: the moments of the reference, or its coarse colours, and the picture's own detail."""

import pytest
import torch
from nodes_helper import run_node

from tessera.methods.control.color import adain, wavelet
from tessera.nodes.control.adain_color_fix import AdainColorFix


def picture(*shape, low=0.4, high=0.6):
    return low + (high - low) * torch.rand(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[1]))


def fixed(image, reference, method):
    return run_node(AdainColorFix, image=image, reference=reference, method=method)[0]


def test_adain_takes_mean_and_deviation_of_each_channel():
    image, reference = picture(2, 24, 32, 3), picture(2, 12, 16, 3, low=0.2, high=0.5) * torch.tensor([1.0, 0.8, 1.1])
    got = fixed(image, reference, "adain")
    assert got.shape == image.shape
    for b in range(2):
        for c in range(3):
            x, want = image[b, ..., c], reference[b, ..., c]
            by_hand = (x - x.mean()) / (x.var() + 1e-5).sqrt() * (want.var() + 1e-5).sqrt() + want.mean()
            assert (got[b, ..., c] - by_hand).abs().max() < 1e-5
            assert abs(got[b, ..., c].mean() - want.mean()) < 1e-4 and abs(got[b, ..., c].std() - want.std()) < 1e-3


def by_hand(x):
    """Five blurs as StableSR has them, the detail summed level by level. x [C, H, W]."""
    high, kernel = torch.zeros_like(x), torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    for level in range(5):
        reach, low = 2**level, torch.zeros_like(x)
        wide = torch.nn.functional.pad(x[None], [reach] * 4, mode="replicate")[0]
        for i in range(3):
            for j in range(3):
                at = wide[:, i * reach : i * reach + x.shape[1], j * reach : j * reach + x.shape[2]]
                low = low + kernel[i, j] * at
        high, x = high + x - low, low
    return high, x


def test_wavelet_takes_the_coarse_colours():
    image, reference = picture(1, 40, 56, 3), picture(1, 40, 56, 3, low=0.3, high=0.5)
    got = fixed(image, reference, "wavelet")
    want = by_hand(image[0].movedim(-1, 0))[0] + by_hand(reference[0].movedim(-1, 0))[1]
    assert (got[0].movedim(-1, 0) - want).abs().max() < 1e-5


@pytest.mark.parametrize("method", [adain, wavelet])
def test_a_picture_in_its_own_colours_is_itself(method):
    image = picture(2, 3, 20, 28)
    assert (method(image, image) - image).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["adain", "wavelet"])
def test_sizes_batches_flat_pictures_and_alpha(method):
    image = torch.cat((picture(3, 20, 28, 3), torch.full((3, 20, 28, 1), 0.25)), -1)
    got = fixed(image, picture(1, 7, 9, 3), method)
    assert got.shape == image.shape and torch.equal(got[..., 3], image[..., 3])
    for each in (0, 2):
        assert (got[each] - fixed(image[each : each + 1], picture(1, 7, 9, 3), method)[0]).abs().max() < 1e-6
    flat = fixed(torch.full((1, 8, 8, 3), 0.5), torch.full((1, 4, 4, 3), 0.2), method)
    assert (flat - 0.2).abs().max() < 1e-5
    assert torch.isfinite(fixed(torch.full((1, 1, 1, 3), 0.5), torch.full((1, 1, 1, 3), 0.2), method)).all()
    loud = fixed(picture(1, 8, 8, 3), picture(1, 8, 8, 3, low=-1, high=2), method)
    assert loud.min() >= 0 and loud.max() <= 1


@pytest.mark.parametrize(
    ("image", "reference", "sentence"),
    [
        (picture(2, 8, 8, 3), picture(3, 8, 8, 3), "2 pictures and 3 references"),
        (picture(1, 8, 8, 1), picture(1, 8, 8, 3), r"image is \[1, 8, 8, 1\]"),
        (picture(1, 8, 8, 3), picture(1, 8, 8, 3) * float("nan"), "reference .* is not finite"),
    ],
)
def test_what_does_not_fit_is_refused(image, reference, sentence):
    with pytest.raises(ValueError, match=sentence):
        fixed(image, reference, "adain")
