"""Cache Schedule as a node: what it finds is what a cache does."""

import json

import pytest
import torch
from calibration_helper import calibrate
from nodes_helper import Job, error, kinds, model_of, run_node, taylor

from tessera.methods.cache.schedule import Schedule
from tessera.nodes.cache.cache_schedule import CacheSchedule


@pytest.mark.parametrize("level", ["last_block", "output"])
def test_a_cache_follows_it(level):
    model, spec = model_of("wan_meta")
    found = calibrate(model, spec, steps=10)[0]
    job = Job(spec, steps=10)
    want, errors = job(model), []
    for budget in (4, 6, 8):
        out = run_node(CacheSchedule, calibration=found, target="full_steps", full_steps=budget)
        schedule, text = out
        assert Schedule.from_json(text) == schedule and schedule.full == budget
        patched = taylor(model, level=level, schedule=schedule)
        errors.append(error(job(patched), want))
        assert kinds(patched) == "".join("f" if computed else "p" for computed in schedule.mask)
        lines = out.ui["tessera_report"][0]["lines"]
        assert f"computes {budget} of 10 steps" in lines[0] and lines[0].count("█") == budget
    assert errors[0] > errors[2] > 0


def test_all_steps_are_bit_equal_and_a_speedup_is_a_budget():
    model, spec = model_of("flux")
    found = calibrate(model, spec, steps=8)[0]
    whole = run_node(CacheSchedule, calibration=found, speedup=1.0)[0]
    job = Job(spec)
    assert all(whole.mask) and torch.equal(job(taylor(model, schedule=whole)), job(model))
    half, text = run_node(CacheSchedule, calibration=found, speedup=2.0, force_first=2, max_gap=3)
    assert half.full <= 4 and half.mask[:2] == (True, True) and half.mask[-1]
    assert json.loads(text)["sigmas"] == list(found.sigmas)
    with pytest.raises(ValueError, match="A budget of 2 of 8 steps is too small"):
        run_node(CacheSchedule, calibration=found, speedup=4.0, force_first=3)
