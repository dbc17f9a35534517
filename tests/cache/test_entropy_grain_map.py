"""Entropy Grain Map: rich regions are 1, flat ones 0, as many as asked, for images and latents of every size."""

import pytest
import torch
from nodes_helper import run_node

from tessera.nodes.cache.entropy_grain_map import EntropyGrainMap


def made(**inputs):
    return run_node(EntropyGrainMap, **inputs)[0]


def half_noise(h: int, w: int):
    """A picture [1, h, w, 3], flat on the left and noise on the right."""
    image = torch.full((1, h, w, 3), 0.4)
    image[:, :, w // 2 :] = torch.rand(1, h, w - w // 2, 3)
    return image


def test_noise_is_fine_and_the_flat_is_not():
    mask = made(image=half_noise(32, 64), region=8)
    assert mask.shape == (1, 32, 64) and mask[:, :, :32].max() == 0 and mask[:, :, 32:].min() == 1
    values = made(image=half_noise(32, 64), region=8, output="entropy")
    assert values[:, :, :32].max() < 0.3 and values[:, :, 32:].min() > 0.8 and values.max() <= 1


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.6, 1.0])
def test_the_share_is_that_asked(ratio):
    mask = made(image=torch.rand(2, 40, 24, 3), region=8, fine_ratio=ratio)
    assert (mask[:, ::8, ::8].flatten(1).sum(1) == round(ratio * 15)).all() and set(mask.unique().tolist()) <= {
        0.0,
        1.0,
    }


@pytest.mark.parametrize("size", [(33, 17), (7, 5), (16, 16)], ids=str)
def test_borders_hold_what_there_is(size):
    image = torch.rand(1, *size, 3)
    mask = made(image=image, region=8, output="entropy")
    assert mask.shape == (1, *size) and mask.isfinite().all()
    last = image[:, size[0] - size[0] % 8 :, size[1] - size[1] % 8 :] if size != (16, 16) else image[:, 8:, 8:]
    alone = made(image=last, region=8, output="entropy")
    assert torch.allclose(mask[:, -1, -1], alone[:, 0, 0], atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 4, 12, 20), (1, 16, 5, 8, 8)], ids=str)
def test_latents(shape):
    x = torch.randn(shape) * 5 - 3
    x[..., :4, :4] = 1.0
    mask = made(latent={"samples": x}, region=4, fine_ratio=0.5)
    assert mask.shape == (shape[0] if len(shape) == 4 else shape[2], *shape[-2:])
    assert mask[:, :4, :4].max() == 0 and mask.max() == 1


def test_bad_input():
    for given in ({}, {"image": torch.rand(1, 8, 8, 3), "latent": {"samples": torch.rand(1, 4, 8, 8)}}):
        with pytest.raises(ValueError, match="takes an image or a latent: connect one of them"):
            made(**given)
    with pytest.raises(ValueError, match="between bins unseen"):
        made(image=torch.rand(1, 8, 8, 3), bins=8)
    with pytest.raises(ValueError, match="pictures or one video"):
        made(latent={"samples": torch.rand(1, 4, 8)})
