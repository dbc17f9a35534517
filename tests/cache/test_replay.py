"""The replay against runs whose error can be computed, and the search on scripted runs."""

import math

import numpy as np
import pytest
import torch

from tessera.methods.cache import solver as s
from tessera.methods.cache.replay import Measured, Record, Replay, head, starts
from tessera.methods.cache.taylor import Forecast

N = 20
SIGMAS = [float(1 - i / N) ** 1.5 for i in range(N + 1)]


def fields(batch=3, seed=0):
    """Predictions of a flow that depends on sigma alone [N, B, n]: there errors keep their size."""
    generator = torch.Generator().manual_seed(seed)
    base, slope, bend = torch.randn(3, batch, 40, generator=generator, dtype=torch.float64)
    return torch.stack([base + slope * sigma + bend * math.sin(2 * sigma) for sigma in SIGMAS[:-1]])


def euler(predictions):
    x = torch.zeros_like(predictions[0])
    for i, v in enumerate(predictions):
        x = x + (SIGMAS[i + 1] - SIGMAS[i]) * v
    return x


def replay_of(predictions, order=1):
    final = euler(predictions)
    gram = torch.einsum("ibk,jbk->bij", predictions, predictions).numpy()
    return Replay([Record(gram, final.norm(dim=1).numpy())], SIGMAS, SIGMAS[:-1], order)


MASKS = [
    tuple(i < 3 or i % 3 == 0 for i in range(N)),
    tuple(i != 8 for i in range(N)),
    tuple(i < 6 or i == N - 1 for i in range(N)),
]


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("mask", MASKS)
def test_it_is_exact_where_errors_keep_their_size(mask, order):
    predictions = fields()
    history, made = Forecast(order), []
    for v, sigma, computed in zip(predictions, SIGMAS, mask, strict=False):
        if computed:
            history.update(v, sigma)
        made.append(v if computed else history.predict(sigma))
    want = (euler(torch.stack(made)) - euler(predictions)).norm() / euler(predictions).norm()
    assert replay_of(predictions, order).raw(mask, 0.0) == pytest.approx(float(want), rel=1e-6)


def measured(mask, error, spread=0.05, seeds=4):
    """Runs of single pictures with just that mean error and spread."""
    wave = np.array([1.0, -1.0] * (seeds // 2))
    errors = (error * (1 + spread * wave * math.sqrt((seeds - 1) / seeds)))[:, None]
    return Measured(tuple(mask), errors, errors[:, 0], float(sum(mask)), float(len(mask)))


def test_growth_is_learned():
    replay = replay_of(fields())
    for i in (3, 6, 9, 12):
        mask = tuple(k != i for k in range(N))
        replay.learn(measured(mask, replay.raw(mask, 4.0) * math.exp(0.7)))
    assert replay.b == pytest.approx(4.0, abs=0.3) and replay.a == pytest.approx(0.7, abs=0.3)
    other = tuple(k not in (5, 8) for k in range(N))
    assert replay.estimate(other) == pytest.approx(replay.raw(other, 4.0) * math.exp(0.7), rel=0.1)


def test_candidates_keep_their_ends():
    masks = replay_of(fields()).schedules(3, 2)
    assert len(masks) > 40 and len(set(masks)) == len(masks)
    assert all(mask[:3] == (True,) * 3 and mask[-2:] == (True, True) and not all(mask) for mask in masks)
    assert {head(mask) for mask in masks} == set(range(3, N - 2))
    assert starts(100, 3, 1)[0] == 3 and len(starts(100, 3, 1)) == 30 and starts(4, 3, 1) == []


@pytest.mark.parametrize("wanted", [0.003, 0.02, 0.08])
def test_schedules_are_found_by_few_runs(wanted):
    """The flow's truth: errors grow more than is usual, and early ones differ between seeds."""
    replay, runs = replay_of(fields()), []

    def run(mask):
        runs.append(mask)
        return measured(mask, replay.raw(mask, 4.5) * 1.7, spread=0.5 * (1 - head(mask) / N) ** 2)

    masks = replay.schedules(3, 1)
    errors = [replay.raw(mask, 4.5) * 1.7 for mask in masks]
    assert min(errors) < wanted < max(errors)
    goal = s.Goal(wanted, 0.0, 0.1)
    found = s.by_schedule(goal, replay, masks, run, 10)
    assert len(runs) <= 10 and len(set(runs)) == len(runs)
    chosen = found[s.best(goal, found)][1]
    assert goal.met(chosen)


def test_a_tolerance_buys_speed():
    def computed(tolerance):
        replay = replay_of(fields())
        run = lambda mask: measured(mask, replay.raw(mask, 3.0), spread=0.5 * (1 - head(mask) / N) ** 2)  # noqa: E731
        goal = s.Goal(0.01, 0.0, tolerance)
        found = s.by_schedule(goal, replay, replay.schedules(3, 1), run, 12)
        return found[s.best(goal, found)][1].full

    assert computed(1.0) < computed(0.1)


@pytest.mark.parametrize("speedup", [1.4, 2.0, 3.0])
def test_a_speedup_is_a_number_of_steps(speedup):
    replay = replay_of(fields())
    found = s.by_schedule(s.Goal(None, speedup, 0.1), replay, replay.schedules(2, 1), lambda m: measured(m, 0.1), 8)
    assert len(found) == 1 and sum(found[0][0]) == round(N / speedup)


@pytest.mark.parametrize("guess", [1e-4, 0.03, 4.0])
def test_thresholds_are_bracketed(guess):
    runs = []

    def run(value):
        runs.append(value)
        return measured((True,), 0.4 * value**0.8)

    goal = s.Goal(0.05, 0.0, 0.1)
    found = s.by_threshold(goal, guess, run, 12, 1e-4, 4.0)
    assert goal.met(found[-1][1]) and len(runs) <= 12
    assert all(1e-4 <= value <= 4.0 for value in runs)


def test_thresholds_that_jump_end_at_the_nearest():
    goal = s.Goal(0.05, 0.0, 0.1)
    found = s.by_threshold(goal, 0.2, lambda v: measured((True,), 0.01 if v < 0.5 else 0.06), 40, 1e-4, 4.0)
    assert len(found) < 40 and found[s.best(goal, found)][1].error == pytest.approx(0.06)
    assert len(s.by_threshold(goal, 1.0, lambda v: measured((True,), 0.001), 40, 1e-4, 4.0)) < 8  # never enough


def test_steady_before_fast():
    goal = s.Goal(0.05, 0.0, 0.1)
    wild, steady = measured([True] * 5 + [False] * 5, 0.05, 0.4), measured([True] * 7 + [False] * 3, 0.05, 0.02)
    assert wild.spread == pytest.approx(0.4) and math.isnan(measured([True], 0.1, seeds=2).spread) is False
    assert s.best(goal, [(0, wild), (1, steady)]) == 1
    assert s.best(s.Goal(0.05, 0.0, 1.0), [(0, wild), (1, steady)]) == 0
    assert not goal.steady(wild) and goal.steady(steady)
