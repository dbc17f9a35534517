"""Caches on a flow whose velocity is known in closed form, a mixture of six Gaussians in the plane: at equal numbers of
computed evaluations a forecast loses less than reuse in any form, EasyCache's among them."""

import math

import pytest
import torch

from tessera.methods.cache.cadence import Cadence
from tessera.methods.cache.easycache import EasyCache
from tessera.methods.cache.gate import Seen
from tessera.methods.cache.taylor import Forecast

STEPS, SEEDS, WIDTH = 50, 32, 0.15


def velocity(x, sigma):
    """E[noise - clean | x] for x [N, 2] = (1 - sigma) clean + sigma noise."""
    angle = torch.arange(6, dtype=torch.float64) * math.pi / 3
    means = torch.stack([angle.cos(), angle.sin()], 1)
    variance = ((1 - sigma) * WIDTH) ** 2 + sigma**2
    apart = x[:, None] - (1 - sigma) * means
    share = (-apart.square().sum(2) / (2 * variance)).softmax(1)[..., None]
    clean = means + (1 - sigma) * WIDTH**2 / variance * apart
    return (share * (sigma * apart / variance - clean)).sum(1)


def schedule(shift):
    linear = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
    return (shift * linear / (1 + (shift - 1) * linear)).tolist()


def run(sigmas, decide, fill):
    """Final points [SEEDS, 2] and computed evaluations. fill.update(v, x, i), fill.predict(x, i)."""
    x = torch.randn(SEEDS, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    full = 0
    for i in range(STEPS):
        if decide(i, x):
            v = velocity(x, sigmas[i])
            fill.update(v, x, i)
            full += 1
        else:
            v = fill.predict(x, i)
        x = x + (sigmas[i + 1] - sigmas[i]) * v
    return x, full


class Filled:
    """Forecasts of v, or of v - x."""

    def __init__(self, order, residual=False, at=lambda i: float(i), direction=1):
        self.history, self.residual, self.at = Forecast(order, direction=direction, scale=float(STEPS)), residual, at

    def update(self, v, x, i):
        self.history.update(v - x if self.residual else v, self.at(i))

    def predict(self, x, i):
        v = self.history.predict(self.at(i))
        return v + x if self.residual else v


def cadenced(interval):
    plan = Cadence(interval, warmup=3, tail_full=1).plan(STEPS)
    return lambda i, x: plan[i]


def median_error(got, want):
    return (got - want).norm(dim=1).median().item()


def easycache(sigmas, want, full):
    """EasyCache's gate and fill at the threshold that computes as many evaluations, or the next higher number."""
    low, high, best = 0.0, 50.0, None
    for _ in range(40):
        middle = (low + high) / 2
        gate, fill = EasyCache(middle), Filled(0, residual=True)

        def decide(i, x, gate=gate, fill=fill):
            seen = Seen(i, i, float(i), sigmas[i], before=x, now=x)
            computes = gate.computes(seen, i < 3 or i == STEPS - 1)
            if computes:
                gate.computed(seen, velocity(x, sigmas[i]))
            return computes

        got, count = run(sigmas, decide, fill)
        if count >= full:
            low, best = middle, (got, count)
        else:
            high = middle
    return median_error(best[0], want), best[1]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("interval", [2, 3, 5])
def test_a_forecast_loses_less_than_reuse_at_equal_evaluations(interval, shift):
    sigmas = schedule(shift)
    want, _ = run(sigmas, lambda i, x: True, Filled(0))
    taylor, full = run(sigmas, cadenced(interval), Filled(1))
    errors = {}
    for name, fill in (("reuse", Filled(0)), ("residual", Filled(0, residual=True))):
        got, count = run(sigmas, cadenced(interval), fill)
        assert count == full
        errors[name] = median_error(got, want)
    if shift == 1:  # shifted, most steps of such an ideal flow change nothing, and any gate beats any cadence there
        errors["easycache"], count = easycache(sigmas, want, full)
        assert full <= count <= full + 6
    assert median_error(taylor, want) <= min(errors.values()), errors
    if interval <= 3 and shift == 1:
        assert median_error(taylor, want) <= 0.25 * errors["reuse"]


def test_the_closed_form_is_a_flow_to_the_mixture():
    """The end of the run lies at the six means, as far as their width."""
    points, _ = run(schedule(1.0), lambda i, x: True, Filled(0))
    assert (points.norm(dim=1) - 1).abs().max() < 5 * WIDTH
