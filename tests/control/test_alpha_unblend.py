"""Blending undone: exact where the alpha is known, least alpha where it is not, and a residual that is what is left."""

import pytest
import torch
from nodes_helper import run_node

from tessera.methods.control.blend import MODES, blend, unblend
from tessera.nodes.control.alpha_blend import AlphaBlend
from tessera.nodes.control.alpha_unblend import AlphaUnblend


def pictures(seed=0, batch=2, size=(5, 7)):
    return torch.rand(batch, *size, 3, generator=torch.Generator().manual_seed(seed))


def scene(mode, size=(64, 64)):
    """Foreground, background and alpha whose composite is a picture: within 0..1, and the background no black or white that
    hides what lies over it."""
    x, y, a = pictures(1, 1, size), pictures(2, 1, size), pictures(3, 1, size)[..., 0]
    if mode == "add":
        return x * 0.5, y * 0.5, a
    return x, {"screen": y * 0.8, "multiply": 0.2 + 0.8 * y}.get(mode, y), a


@pytest.mark.parametrize("mode", MODES)
def test_the_round_trip_gives_the_foreground_back(mode):
    x, y, a = scene(mode)
    z, used = run_node(AlphaBlend, foreground=x, background=y, alpha=a, mode=mode).args
    back, alpha, residual = run_node(AlphaUnblend, composite=z, background=y, mode=mode, alpha=used).args
    room = {"screen": 1 - y, "multiply": y}.get(mode, torch.ones_like(y))
    told = (used[..., None] * room) > 0.05
    assert 0.5 < told.float().mean() < 1
    assert (back - x)[told].abs().max() <= 1e-6
    assert torch.equal(alpha, used) and residual.max() < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_the_round_trip_in_fp64_loses_nothing(mode):
    x, y, a = (t.double() for t in scene(mode))
    back, _, residual = unblend(blend(x, y, a, mode), y, mode, a)
    assert (back - x)[a > 0.05].abs().max() < 1e-12 and residual.max() < 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_without_alpha_the_most_transparent_foreground_explains_the_composite(mode):
    x, y, a = scene(mode)
    z = blend(x, y, a, mode)
    found, alpha, residual = run_node(AlphaUnblend, composite=z, background=y, mode=mode).args
    assert residual.max() < 1e-6 and found.min() >= 0 and found.max() <= 1
    assert (alpha <= a + 1e-6).all() and (alpha < a - 1e-3).any(), "never more than what made it"
    assert (blend(found, y, alpha, mode) - z).abs().max() < 1e-6
    less = unblend(z, y, mode, alpha * 0.99)[2].amax(-1)
    assert (less[alpha > 0.05] > 1e-6).float().mean() > 0.99, "with less alpha no foreground explains it"


@pytest.mark.parametrize("mode", MODES)
def test_the_residual_is_what_no_foreground_explains(mode):
    """A screen cannot darken, a tint cannot lighten; what is outside of the alpha is not covered."""
    _, y, a = scene(mode)
    a = torch.where(a > 0.5, a, torch.zeros_like(a))
    z = (1 - y) if mode == "alpha" else (y * 0.5 if mode in ("screen", "add") else y + (1 - y) * 0.5)
    foreground, _, residual = run_node(AlphaUnblend, composite=z, background=y, mode=mode, alpha=a).args
    assert torch.allclose(residual, (z - blend(foreground, y, a, mode)).abs(), atol=1e-6)
    bare = residual[a == 0]
    assert torch.allclose(bare, (z - y).abs()[a == 0], atol=1e-6) and bare.max() > 0.2
    if mode != "alpha":
        assert run_node(AlphaUnblend, composite=z, background=y, mode=mode).args[2].max() > 0.2


def test_a_place_that_tells_nothing_stays_empty():
    """Black under a tint, white under a screen and alpha 0 hide the foreground: neutral there, nothing unexplained."""
    x, a = pictures(1), torch.ones(2, 5, 7)
    for mode, y, neutral in (("multiply", 0.0, 1.0), ("screen", 1.0, 0.0)):
        back = torch.full_like(x, y)
        found, _, residual = unblend(blend(x, back, a, mode), back, mode, a)
        assert (found == neutral).all() and residual.max() == 0
    for mode in MODES:
        found, alpha, residual = unblend(x, x, mode, None)
        assert not alpha.any() and residual.max() == 0 and (found == (mode == "multiply")).all()


def test_the_line_tells_the_residual():
    x, y, a = scene("alpha")
    out = run_node(AlphaUnblend, composite=blend(x, y, a, "alpha") + 0.25, background=y, alpha=torch.zeros_like(a))
    (line,) = out.ui["tessera_report"][0]["lines"]
    assert line == f"residual: greatest {out.args[2].max().item():.3g}, mean {out.args[2].mean().item():.3g}"
    with pytest.raises(ValueError, match="one size"):
        run_node(AlphaUnblend, composite=x, background=pictures(size=(5, 9), batch=1))
