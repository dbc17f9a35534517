"""Solvers of flows against known solutions: orders there, and there and back."""

import math

import pytest
import torch

from tessera.methods.sampling.flow import (
    SOLVERS,
    evaluations,
    omega_scale,
    scaled_about_mean,
    solve,
    velocity,
)

POINTS = 16, 32, 64, 128


def grid(n, start=1.0, end=0.0):
    return [start + (end - start) * i / n for i in range(n + 1)]


def bent(x, t):
    """A nonlinear field that depends on time; its errors have no symmetry that could hide an order."""
    return torch.tanh(1.5 * x + t) + 0.5 * torch.sin(3 * t * torch.ones_like(x)) * x


def start():
    return torch.linspace(-2, 2, 9, dtype=torch.float64)[None]


def there_and_back(field, solver, n):
    x = start()
    return (solve(field, solve(field, x, grid(n, 0.0, 1.0), solver), grid(n), solver) - x).abs().max().item()


def slopes(errors):
    return [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]


@pytest.mark.parametrize(
    ("solver", "order", "back"), [("euler", 1, 1), ("rf_solver", 2, 3), ("fireflow", 2, None), ("ralston_3", 3, 3)]
)
def test_orders(solver, order, back):
    exact = solve(bent, start(), grid(4096), "ralston_3")
    errors = [(solve(bent, start(), grid(n), solver) - exact).abs().max().item() for n in POINTS]
    assert all(order - 0.15 < s < order + 0.25 for s in slopes(errors)), errors
    if back is not None:
        returns = [there_and_back(bent, solver, n) for n in POINTS]
        assert all(back - 0.2 < s < back + 0.2 for s in slopes(returns)), returns


@pytest.mark.parametrize("n", POINTS)
def test_round_trip_against_euler_at_equal_evaluations(n):
    assert evaluations("rf_solver", n) == evaluations("euler", 2 * n)
    assert there_and_back(bent, "rf_solver", n) < there_and_back(bent, "euler", 2 * n) / 5
    assert there_and_back(bent, "fireflow", n) < there_and_back(bent, "euler", n) / 5


def gaussian(mean, spread):
    """The flow between N(mean, spread^2) at 0 and N(0, 1) at 1, and its solution from x at 1 to 0."""

    def field(x, t):
        variance = (1 - t) ** 2 * spread**2 + t**2
        return (t - (1 - t) * spread**2) / variance * (x - (1 - t) * mean) - mean

    return field, lambda x: mean + spread * x


def test_gaussian_flow_against_its_closed_form():
    field, exact = gaussian(0.7, 0.4)
    errors = {s: (solve(field, start(), grid(32), s) - exact(start())).abs().max().item() for s in SOLVERS}
    equal = (solve(field, start(), grid(64), "euler") - exact(start())).abs().max().item()
    assert errors["rf_solver"] < equal / 20 and errors["ralston_3"] < equal / 20 and errors["fireflow"] < equal / 5


def test_it_is_the_second_order_taylor_step():
    """The paper's own form: x + h v + h^2 / 2 v', v' the difference quotient over half the step."""
    x = start()
    for at, to in zip(grid(20), grid(20)[1:], strict=False):
        h = to - at
        v = bent(x, at)
        slope = (bent(x + h / 2 * v, at + h / 2) - v) / (h / 2)
        x = x + h * v + h * h / 2 * slope
    assert (solve(bent, start(), grid(20), "rf_solver") - x).abs().max() < 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("euler_last", [False, True])
def test_a_straight_flow_is_exact_and_evaluations_are_counted(solver, euler_last):
    asked = []

    def field(x, t):
        asked.append(t)
        return torch.full_like(x, 3.0)

    for n in (1, 5):
        asked.clear()
        out = solve(field, start(), grid(n), solver, euler_last=euler_last)
        assert (out - (start() - 3)).abs().max() < 1e-12
        assert len(asked) == evaluations(solver, n, euler_last) and min(asked) > 0


def test_velocity_of_a_denoiser_and_its_floor():
    seen = []

    def denoise(x, sigma):
        seen.append(sigma)
        return x - sigma * bent(x, sigma)

    field = velocity(denoise, 1e-3)
    assert (field(start(), 0.5) - bent(start(), 0.5)).abs().max() < 1e-12
    assert (field(start(), 0.0) - bent(start(), 0.0)).abs().max() < 0.01 and seen == [0.5, 1e-3]


@pytest.mark.parametrize(("solver", "more"), [("rf_solver", 2e-5), ("ralston_3", 1e-4)])
def test_the_default_floor_keeps_the_round_trip(solver, more):
    field = velocity(lambda x, sigma: x - sigma * bent(x, sigma), 1e-3)
    for n in (16, 32):
        assert there_and_back(field, solver, n) < there_and_back(bent, solver, n) + more
        assert there_and_back(field, solver, n) < there_and_back(bent, "euler", 2 * n) / 5


def test_omega():
    assert omega_scale(0) == 1.0 and abs(omega_scale(10) - 1.046212) < 1e-6
    assert 0.9 < omega_scale(-100) < 0.9001 and 1.0999 < omega_scale(100) < 1.1
    dx = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    out = scaled_about_mean(dx, 1.05)
    inner = (1, 2, 3)
    torch.testing.assert_close(out.mean(inner), dx.mean(inner))
    torch.testing.assert_close(out.std(inner), 1.05 * dx.std(inner))
    assert torch.equal(out[:1], scaled_about_mean(dx[:1], 1.05))  # rows do not know of each other


def test_omega_under_a_mask():
    dx = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    mask = torch.zeros(1, 1, 4, 6, dtype=torch.float64)
    mask[..., 2:] = 1
    out = scaled_about_mean(dx, 1.08, mask)
    assert torch.equal(out[..., :2], dx[..., :2])
    torch.testing.assert_close(out[..., 2:], scaled_about_mean(dx[..., 2:], 1.08))
