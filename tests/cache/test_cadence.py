import pytest

from tessera.methods.cache.cadence import Cadence


def full(decisions):
    return [i for i, computed in enumerate(decisions) if computed]


@pytest.mark.parametrize(
    "interval, warmup, steps, expected",
    [
        (6, 3, 50, [0, 1, 2, 8, 14, 20, 26, 32, 38, 44]),
        (5, 1, 50, list(range(0, 50, 5))),
        (5, 3, 28, [0, 1, 2, 7, 12, 17, 22, 27]),
        (5, 0, 11, [0, 5, 10]),
        (1, 3, 10, list(range(10))),
    ],
)
def test_lists_of_the_paper_code(interval, warmup, steps, expected):
    assert full(Cadence(interval, warmup, tail_full=0).plan(steps)) == expected


def test_the_tail_is_computed():
    assert full(Cadence(6, 3, tail_full=2).plan(20)) == [0, 1, 2, 8, 14, 18, 19]


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_nothing_is_skipped_in_a_run_of_warmup_plus_one(steps):
    cadence = Cadence(5, 3, tail_full=0)
    assert all(cadence.plan(steps))
    assert full(cadence.plan(5)) == [0, 1, 2]


def test_each_call_counts():
    plan = Cadence(3, 2, tail_full=1).plan(6, evals_per_step=2)
    assert full(plan) == [0, 1, 4, 7, 10, 11]  # of 12 calls, the last step's two are the tail


def test_whole_steps_are_skipped():
    plan = Cadence(3, 2, tail_full=1, multi_eval="skip_whole_steps").plan(8, evals_per_step=2)
    assert plan[::2] == plan[1::2]
    assert full(plan[::2]) == [0, 1, 4, 7]
    assert all(Cadence(3, 2, 0, "skip_whole_steps").plan(3, evals_per_step=2))  # 3 steps are warmup + 1


def test_outside_the_window_everything_is_computed():
    sigmas = [1 - i / 12 for i in range(12)]
    cadence = Cadence(3, 0, tail_full=0, sigma_window=(0.8, 0.3))
    # steps 3 to 8 lie inside; the interval runs on from step 2, the last one computed before it
    assert full(cadence.plan(12, sigmas=sigmas)) == [0, 1, 2, 5, 8, 9, 10, 11]


def test_a_forced_evaluation_restarts_the_interval():
    cadence = Cadence(5, 1, tail_full=0)
    assert not cadence.computes(7, 7, 50, last_full=3)
    assert cadence.computes(8, 8, 50, last_full=3)
    assert not cadence.computes(8, 8, 50, last_full=6)
    assert cadence.computes(11, 11, 50, last_full=6)


def test_the_second_stream_of_an_evaluation_agrees():
    for cadence in (Cadence(4, 1, 0), Cadence(4, 1, 0, "skip_whole_steps")):
        assert cadence.computes(8, 8, 50, last_full=4) and cadence.computes(8, 8, 50, last_full=8)
        assert not cadence.computes(9, 9, 50, last_full=8)


def test_a_stream_without_history_is_computed():
    assert Cadence(5, 1, 0).computes(13, 13, 50, last_full=None)
    assert Cadence(5, 1, 0).computes(1, 1, 4, last_full=None, schedule=[True, False, False, True])


def test_known_evaluations_decide_the_short_run_rule():
    cadence = Cadence(5, 3, tail_full=0)
    assert cadence.computes(1, 3, 4, last_full=2)
    assert not cadence.computes(1, 3, 4, last_full=2, total_evals=8)


def test_schedule_replaces_the_cadence():
    schedule = [True, False, True, True, False, False]
    assert Cadence(2, 4, tail_full=3).plan(6, schedule=schedule) == schedule
    assert Cadence().plan(6, evals_per_step=2, schedule=schedule)[1::2] == schedule


def test_first_recorded_evaluation():
    assert [Cadence(warmup=w).first_recorded for w in (0, 1, 2, 3, 5)] == [0, 0, 0, 1, 3]


def test_settings_are_checked():
    for call, sentence in [
        (lambda: Cadence(interval=0), "interval >= 1"),
        (lambda: Cadence(warmup=-1), "warmup >= 0"),
        (lambda: Cadence(multi_eval="each"), "count_each, skip_whole_steps"),
        (lambda: Cadence(sigma_window=(0.2, 0.8)), "below its end"),
        (lambda: Cadence().plan(5, schedule=[True] * 4), "decides 4 steps but the sampler runs 5"),
        (lambda: Cadence().plan(2, schedule=[False, True]), "first step"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            call()
