"""The dynamic programme against every schedule there is, and what its rules promise."""

from itertools import product

import numpy as np
import pytest
import torch

from tessera.methods.cache.calibration import Calibration, Recorder
from tessera.methods.cache.schedule_search import METRICS, Rules, budget_of, cost, search, segment_errors

METRIC = pytest.mark.parametrize("metric", METRICS)


def calibration(seed: int, steps: int) -> Calibration:
    """A run whose features wander, with uneven sigmas."""
    generator = torch.Generator().manual_seed(seed)
    recorder = Recorder(0)
    path = torch.randn(steps, 6, 5, generator=generator).cumsum(0) + torch.randn(6, 5, generator=generator)
    for after in path:
        before = recorder.keep(torch.zeros_like(after))
        recorder.add(before, before, after)
    sigmas = (torch.rand(steps, generator=generator) + 0.05).cumsum(0).flip(0).tolist()
    return recorder.finish("", "", sigmas, "sigma", "last_block", "input")


def every_cost(errors, rules: Rules) -> list[tuple[float, tuple[bool, ...]]]:
    n = len(errors)
    must = rules.must(n)
    found = []
    for mask in product((False, True), repeat=n):
        at = [i for i, computed in enumerate(mask) if computed] + [n]
        gaps = [b - a for a, b in zip(at, at[1:], strict=False)]
        legal = all(c or not m for c, m in zip(mask, must, strict=True)) and sum(mask) <= rules.budget
        if legal and (not rules.max_gap or max(gaps) <= rules.max_gap):
            found.append((cost(errors, mask), mask))
    return found


@METRIC
def test_it_is_exact(metric):
    generator = np.random.default_rng(1)
    for seed in range(200):
        n = 10 if seed % 50 == 0 else int(generator.integers(2, 8))
        rules = Rules(
            int(generator.integers(2, n + 1)), 1, int(generator.integers(0, 2)), int(generator.integers(0, 4))
        )
        found = calibration(seed, n)
        errors = segment_errors(found, metric)
        legal = every_cost(errors, rules)
        if not legal:
            with pytest.raises(ValueError, match="is too small"):
                search(found, metric, rules)
            continue
        schedule, total = search(found, metric, rules)
        assert schedule.mask in [mask for _, mask in legal]
        assert total == pytest.approx(min(legal)[0], abs=1e-9)
        assert total == pytest.approx(cost(errors, schedule.mask), abs=1e-9)


@METRIC
def test_more_budget_never_costs_more_and_all_steps_cost_nothing(metric):
    found = calibration(3, 24)
    totals = [search(found, metric, Rules(k))[1] for k in range(2, 25)]
    assert all(b <= a + 1e-12 for a, b in zip(totals, totals[1:], strict=False)) and totals[0] > totals[-1] == 0
    schedule, total = search(found, metric, Rules(24))
    assert total == 0 and all(schedule.mask) and schedule.sigmas == found.sigmas


def test_an_error_that_depends_on_distance_alone_gives_equal_segments():
    n = 24
    far = [[abs(i - j) / n for j in range(n)] for i in range(n)]
    rows = tuple(map(tuple, far))
    flat = (1.0, *[1.0] * (n - 1))
    found = Calibration("", "", tuple(1 - i / n for i in range(n)), "step", "last_block", "input", rows, rows, rows,
                        flat, flat, flat, ())  # fmt: skip
    for budget in (3, 4, 5, 6, 7):
        mask = search(found, "reuse_rel_l1", Rules(budget, last=0))[0].mask
        at = [i for i, computed in enumerate(mask) if computed] + [n]
        gaps = [b - a for a, b in zip(at, at[1:], strict=False)]
        assert len(gaps) == budget and max(gaps) - min(gaps) <= 1


def test_forecasts_on_a_straight_line_need_two_steps():
    recorder, base, slope = Recorder(0), torch.randn(6, 5), torch.randn(6, 5)
    sigmas = [1.0, 0.9, 0.7, 0.4, 0.2]
    for sigma in sigmas:
        after = base + sigma * slope
        before = recorder.keep(torch.zeros_like(after))
        recorder.add(before, before, after)
    found = recorder.finish("", "", sigmas, "sigma", "last_block", "input")
    schedule, total = search(found, "taylor1_error", Rules(2, last=0))
    assert schedule.mask == (True, True, False, False, False) and total < 1e-4


@METRIC
def test_errors_are_those_of_the_calibration(metric):
    found = calibration(5, 7)
    errors = segment_errors(found, metric)
    if metric == "taylor1_error":
        assert errors[1, 3, 6] == pytest.approx(found.forecast_error((3, 1), 6), abs=1e-9)
        assert errors[0, 0, 2] == pytest.approx(found.forecast_error((0,), 2), abs=1e-9)
    else:
        at = 1 - found.cosine[3][6] if metric == "reuse_cosine" else found.rel_l1[3][6]
        assert errors[1, 3, 6] == errors[0, 3, 6] == pytest.approx(at)


def test_hundred_steps():
    found = calibration(2, 100)
    schedule, total = search(found, "taylor1_error", Rules(50, 3, 2, 8))
    assert schedule.full <= 50 and schedule.mask[:3] == (True,) * 3 and schedule.mask[-2:] == (True, True)
    assert total == pytest.approx(cost(segment_errors(found, "taylor1_error"), schedule.mask), rel=1e-9)
    with pytest.raises(ValueError, match="up to 200 steps, got 201. Use reuse_rel_l1"):
        search(calibration(2, 201), "taylor1_error", Rules(9))


def test_budgets():
    assert [budget_of(20, s) for s in (1.0, 2.0, 3.0, 10.0, 40.0)] == [20, 10, 6, 2, 1]
    with pytest.raises(ValueError, match="A budget of 3 of 20 steps is too small: the 3 first and 1 last steps take 4"):
        search(calibration(0, 20), "reuse_cosine", Rules(3, 3, 1))
    with pytest.raises(ValueError, match="Unknown metric 'x'. Use one of reuse_cosine"):
        search(calibration(0, 5), "x", Rules(3))
    with pytest.raises(ValueError, match="force_first of at least 1"):
        search(calibration(0, 5), "reuse_cosine", Rules(3, 0))
