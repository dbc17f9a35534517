"""Blends as formulas, pixel by pixel, and what they refuse."""

import pytest
import torch
from nodes_helper import run_node

from tessera.methods.control.blend import MODES
from tessera.nodes.control.alpha_blend import AlphaBlend


def pictures(seed=0, batch=2, size=(5, 7), channels=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, *size, channels, generator=generator)


def by_hand(x, y, a, mode):
    """One channel of one pixel, as the definition has it: (1 - a) y + a B(x, y)."""
    over = {"alpha": x, "screen": 1 - (1 - x) * (1 - y), "add": x + y, "multiply": x * y}[mode]
    return (1 - a) * y + a * over


@pytest.mark.parametrize("mode", MODES)
def test_each_blend_is_its_definition(mode):
    x, y, a = pictures(1), pictures(2), pictures(3)[..., 0]
    z, used = run_node(AlphaBlend, foreground=x, background=y, alpha=a, mode=mode, strength=0.7).args
    assert torch.allclose(used, a * 0.7) and z.dtype == torch.float32
    for at in ((0, 0, 0), (1, 4, 6), (0, 2, 3)):
        for c in range(3):
            want = by_hand(x[at][c].item(), y[at][c].item(), used[at].item(), mode)
            assert abs(z[at][c].item() - want) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_strength_0_is_the_background_bit_for_bit(mode):
    y = pictures(2)
    z, used = run_node(AlphaBlend, foreground=pictures(1), background=y, mode=mode, strength=0.0).args
    assert torch.equal(z, y) and not used.any()


def test_the_fourth_channel_is_the_alpha_unless_one_is_connected():
    x, y, a = pictures(1, channels=4), pictures(2), pictures(3)[..., 0]
    own = run_node(AlphaBlend, foreground=x, background=y).args
    assert torch.equal(own[1], x[..., 3])
    assert torch.equal(own[0], run_node(AlphaBlend, foreground=x[..., :3], background=y, alpha=x[..., 3]).args[0])
    assert torch.equal(run_node(AlphaBlend, foreground=x, background=y, alpha=a).args[1], a)
    assert torch.equal(run_node(AlphaBlend, foreground=x[..., :3], background=y).args[0], x[..., :3]), (
        "opaque without any"
    )


def test_one_picture_serves_a_batch():
    x, y = pictures(1, batch=1), pictures(2, batch=3)
    z, a = run_node(AlphaBlend, foreground=x, background=y, alpha=torch.full((1, 5, 7), 0.25)).args
    assert z.shape == y.shape and a.shape == (3, 5, 7)
    assert torch.allclose(z[2], 0.75 * y[2] + 0.25 * x[0], atol=1e-6)
    assert run_node(AlphaBlend, foreground=y, background=x).args[0].shape == y.shape
    flat = run_node(AlphaBlend, foreground=x, background=y, alpha=torch.full((5, 7), 0.25)).args
    assert torch.equal(flat[0], z) and torch.equal(flat[1], a), "a mask without a batch"


def test_what_cannot_be_is_refused():
    x = pictures()
    with pytest.raises(ValueError, match=r"one size .*foreground 7 x 5, background 9 x 5.*Scale or crop"):
        run_node(AlphaBlend, foreground=x, background=pictures(size=(5, 9)))
    with pytest.raises(ValueError, match="one size .* alpha 64 x 64"):
        run_node(AlphaBlend, foreground=x, background=x, alpha=torch.zeros(1, 64, 64))
    with pytest.raises(ValueError, match="equal batches.*foreground 2, background 3"):
        run_node(AlphaBlend, foreground=x, background=pictures(batch=3))
    with pytest.raises(ValueError, match="3 or 4 channels, got 1"):
        run_node(AlphaBlend, foreground=x[..., :1], background=x)
    with pytest.raises(ValueError, match="got background with values that are not finite"):
        run_node(AlphaBlend, foreground=x, background=x.clone().index_fill_(1, torch.tensor(2), float("nan")))
