"""Where a run stands, told from the sigmas alone: every sampler of ComfyUI, and schedules that are not a plain fall."""

import comfy.samplers
import pytest
import torch
from nodes_helper import Job, facts, model_of, taylor

from tessera.patching.clock import Clock, expected_evaluations

FALL = [1.0, 0.8, 0.5, 0.2, 0.0]


def ticked(schedule, sigmas):
    clock, seen = Clock(list(schedule)), []
    for sigma in sigmas:
        clock.tick(sigma)
        seen.append((clock.step, clock.sub))
    return clock, seen


def test_euler():
    clock, seen = ticked(FALL, FALL[:-1])
    assert seen == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert (clock.evaluation, clock.steps, clock.position, clock.restarts) == (3, 4, 3.0, 0)


def test_before_the_first_tick():
    clock = Clock(FALL)
    assert (clock.evaluation, clock.step, clock.sub) == (-1, 0, 0)


def test_heun():
    """Evaluates point i, then i + 1, where the next step starts again; the last step ends at 0 with one evaluation."""
    clock, seen = ticked(FALL, [1.0, 0.8, 0.8, 0.5, 0.5, 0.2, 0.2])
    assert seen[2:] == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    assert clock.restarts == 0 and clock.evaluation == 6


def planned(sampler, schedule, sigmas):
    clock, seen = Clock(list(schedule), expected_evaluations(sampler, schedule)), []
    for sigma in sigmas:
        clock.tick(sigma)
        seen.append((clock.step, clock.sub))
    return clock, seen


def test_heun_by_name_knows_its_first_step_too():
    clock, seen = planned("sample_heun", FALL, [1.0, 0.8, 0.8, 0.5, 0.5, 0.2, 0.2])
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    assert clock.restarts == 0 and not clock.returns and clock.evaluations_a_step == 2


def test_heunpp2_by_name_goes_back_without_a_restart():
    clock, seen = planned("sample_heunpp2", FALL, [1.0, 0.8, 0.5, 0.8, 0.5, 0.2, 0.5, 0.2, 0.2])
    assert [step for step, _ in seen] == [0, 0, 0, 1, 1, 1, 2, 2, 3] and [sub for _, sub in seen][:4] == [0, 1, 2, 0]
    assert clock.restarts == 0 and clock.returns and clock.series == 0


def test_a_sampler_that_is_not_what_its_name_says():
    """A churning heun, or another pack's function of the same name: from there on the sigmas tell."""
    clock, seen = planned("sample_heun", FALL, [1.0, 0.89, 0.8, 0.63, 0.5, 0.32, 0.2])
    assert [step for step, _ in seen] == [0, 0, 1, 1, 2, 2, 3] and not clock.expected


def test_names_that_are_not_known_expect_nothing():
    assert expected_evaluations("sample_euler", FALL) == expected_evaluations("", FALL) == ()
    assert expected_evaluations("sample_heun", [0.5, 0.2]) == ((0, 0, 0), (1, 0, 1))
    assert expected_evaluations("sample_heun", [0.5]) == () == expected_evaluations("sample_heun", [])


def test_dpm_2():
    clock, seen = ticked(FALL, [1.0, 0.89, 0.8, 0.63, 0.5, 0.32, 0.2])
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    assert clock.restarts == 0


def test_position_within_a_step():
    assert ticked(FALL, [1.0, 0.9])[0].position == pytest.approx(0.5)
    assert ticked(FALL, [1.0, 0.8, 0.725])[0].position == pytest.approx(1.25)


def test_float32_noise_is_the_same_point():
    schedule = torch.linspace(1, 0, 11).tolist()
    clock, seen = ticked(schedule, [s * (1 + 3e-6) for s in schedule[:-1]])
    assert [step for step, _ in seen] == list(range(10)) and clock.restarts == 0


def test_sampler_that_goes_back_up_a_falling_schedule():
    clock, seen = ticked(FALL, [1.0, 0.8, 0.5, 0.8, 0.5, 0.2])
    assert [step for step, _ in seen] == [0, 1, 2, 1, 2, 3] and clock.restarts == 1


def test_schedule_that_holds_a_restart_counts_on():
    """The second fall passes through the same sigmas: they are later steps."""
    schedule = [1.0, 0.6, 0.3, 0.6, 0.3, 0.0]
    clock, seen = ticked(schedule, schedule[:-1])
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4] and clock.restarts == 1
    clock, seen = ticked(schedule, [1.0, 0.8, 0.6, 0.45, 0.3, 0.4, 0.6, 0.45, 0.3])
    assert [step for step, _ in seen] == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_inversion_runs_the_other_way():
    clock, seen = ticked(FALL[::-1], FALL[:0:-1])
    assert [step for step, _ in seen] == [0, 1, 2, 3] and clock.restarts == 0
    clock.tick(0.2)
    assert clock.restarts == 1 and clock.step == 1


def test_partial_denoise_starts_at_its_own_step_0():
    _, seen = ticked([0.4, 0.3, 0.1, 0.0], [0.4, 0.3, 0.1])
    assert [step for step, _ in seen] == [0, 1, 2]


def test_sigmas_outside_the_schedule():
    assert ticked(FALL, [3.0])[0].position == 0.0
    assert ticked([1.0, 0.5, 0.2], [1.0, 0.05])[0].step == 1
    assert ticked([1.0], [1.0])[0].steps == 1


OWN_SIGMAS = ("dpm_fast", "dpm_adaptive")
RETURNS = ("dpm_adaptive",)  # goes back to an earlier point by design: the same to the clock as a restart


@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_every_sampler_of_comfyui(sampler):
    model, spec = model_of("flux")
    patched = taylor(model, level="output")
    assert torch.isfinite(Job(spec, steps=6, cfg=1.0, sampler=sampler)(patched)).all()
    steps = [d["step"] for d in facts(patched)["decisions"]]
    assert steps[0] == 0 and facts(patched)["forecast"] > 0
    if sampler not in RETURNS:
        assert steps == sorted(steps)
    if sampler not in OWN_SIGMAS:
        assert sorted(set(steps)) == list(range(6))


@pytest.mark.parametrize("name", ["heun", "exp_heun_2_x0", "exp_heun_2_x0_sde", "heunpp2"])
@pytest.mark.parametrize("level", ["last_block", "output"])
def test_steps_that_look_ahead_are_whole(name, level):
    """Every call of a step shares its decision from the first step on, and forecasts pay."""
    model, spec = model_of("flux")
    patched = taylor(model, level=level, multi_eval="skip_whole_steps", warmup=1, interval=2)
    assert torch.isfinite(Job(spec, steps=6, cfg=1.0, sampler=name)(patched)).all()
    by_step = {}
    for d in facts(patched)["decisions"]:
        by_step.setdefault(d["step"], set()).add(d["kind"])
    assert len(by_step) == 6 and all(len(found) == 1 for found in by_step.values())
    assert by_step[0] == {"full"} and by_step[1] == {"forecast"}
    calls = {step: sum(d["step"] == step for d in facts(patched)["decisions"]) for step in by_step}
    assert list(calls.values()) == ([3, 3, 3, 3, 2, 1] if name == "heunpp2" else [2] * 5 + [1])


def test_heunpp2_forecasts_by_default():
    model, spec = model_of("flux")
    patched = taylor(model)
    Job(spec, sampler="heunpp2")(patched)
    assert facts(patched)["restarts"] == 0 and facts(patched)["forecast"] >= 8


@pytest.mark.parametrize("name", ["heun", "exp_heun_2_x0", "heunpp2"])
def test_a_schedule_that_stops_early_has_whole_steps_too(name):
    """The first of two samplers: its sigmas end above 0."""
    model, spec = model_of("flux")
    patched = taylor(model, multi_eval="skip_whole_steps", warmup=1, interval=2)
    Job(spec, sigmas=torch.linspace(1, 0.4, 7), cfg=1.0, sampler=name)(patched)
    by_step = {}
    for d in facts(patched)["decisions"]:
        by_step.setdefault(d["step"], set()).add(d["kind"])
    assert facts(patched)["restarts"] == 0 and len(by_step) == 6
    assert all(len(found) == 1 for found in by_step.values()) and by_step[1] == {"forecast"}
