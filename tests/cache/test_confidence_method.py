import math

import pytest
import torch

from tessera.methods.cache.confidence import METRICS, Confidence, Predicted
from tessera.methods.cache.gate import Seen
from tessera.methods.cache.taylor import Forecast

XS = [1.0, 0.93, 0.8, 0.72, 0.5, 0.41, 0.2, 0.1]  # falling sigmas, irregular


def seen(i: int, now: torch.Tensor, every: torch.Tensor | None = None) -> Seen:
    return Seen(i, i, XS[i], XS[i], now, now, every=every)


def run(gate, features, warmup=2) -> str:
    """The gate's decisions, one letter an evaluation, after `warmup` forced ones."""
    return "".join("f" if gate.computes(seen(i, f), i < warmup) else "p" for i, f in enumerate(features))


def line(noise: float = 0.0):
    a, b = torch.randn(2, 3, 40, 8)
    return [a + b * x + noise * torch.randn(3, 40, 8) for x in XS]


@pytest.mark.parametrize("metric", METRICS)
def test_a_linear_trajectory_is_trusted_after_two(metric):
    gate, errors = Confidence(1e-5, Forecast(1), metric), []
    for i, now in enumerate(line()):
        assert gate.computes(seen(i, now), False) == (i < 2)
        errors.append(gate.error)
    assert errors[0] is None and errors[1] > 1e-4 and max(errors[2:]) < 1e-6


@pytest.mark.parametrize("k", [3, 6])
def test_a_jump_of_the_first_block_is_computed(k):
    features = line()
    features[k] = features[k] + 1
    got = run(Confidence(0.01, Forecast(1)), features)
    assert got[:k] == "ff" + "p" * (k - 2) and got[k] == "f"


def test_errors_are_those_of_the_definition():
    features = line(0.1)
    a, b, now = features[:3]
    t = (XS[2] - XS[1]) / (XS[1] - XS[0])
    guess = b + t * (b - a)
    sample = [(guess[i] - now[i]).abs().mean() / now[i].abs().mean() for i in range(3)]
    cosine = (guess * now).sum() / (guess.norm() * now.norm())
    want = {"rel_l1": (guess - now).abs().mean() / now.abs().mean(), "rel_l2": (guess - now).norm() / now.norm(),
            "cosine": 1 - cosine}  # fmt: skip
    for metric in METRICS:
        gate = Confidence(0.0, Forecast(1), metric)
        run(gate, features[:3])
        assert gate.error == pytest.approx(want[metric].item(), rel=1e-4)
    gate = Confidence(0.0, Forecast(1), over="max")
    run(gate, features[:3])
    assert gate.error == pytest.approx(max(sample).item(), rel=1e-4) and gate.error > want["rel_l1"]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("over", ["first_stream", "max"])
def test_the_order_of_a_batch_does_not_matter(metric, over):
    features, gates = line(0.1), [Confidence(0.2, Forecast(1), metric, over) for _ in range(2)]
    assert run(gates[0], features) == run(gates[1], [f[[2, 0, 1]] for f in features])
    assert gates[0].error == pytest.approx(gates[1].error, rel=1e-5)


def test_all_rows_are_judged_together():
    still = [torch.ones(1, 40, 8) for _ in XS]
    others = [torch.cat((s, f)) for s, f in zip(still, line(0.5), strict=True)]
    alone, joined = Confidence(0.01, Forecast(1)), Confidence(0.01, Forecast(1), over="all_rows")
    for i, (now, every) in enumerate(zip(still, others, strict=True)):
        assert alone.computes(seen(i, now, every), False) == (i < 1)
        assert joined.computes(seen(i, now, every), False)
    assert alone.error == 0 and joined.error > 0.1
    assert joined.bytes_held == 8 * alone.bytes_held  # four times the rows, two entries against one


@pytest.mark.parametrize("every_step", [False, True])
def test_the_history_follows_what_is_computed(every_step):
    """A curve: from two old points its forecast grows worse and worse, from the newest two it stays as it is."""
    features = [torch.full((1, 5), 3 + x * x) for x in XS]
    gate, errors = Confidence(math.inf, Forecast(1), every_step=every_step), []
    for i, now in enumerate(features):
        gate.computes(seen(i, now), i < 2)
        errors.append(gate.error)
    assert gate.history._xs == (XS[:-3:-1] if every_step else XS[1::-1])
    assert (errors[-1] > 3 * errors[3]) == (not every_step)
    assert gate.bytes_held == 2 * features[0].nbytes


def test_forced_evaluations_are_measured_and_remembered():
    gate = Confidence(math.inf, Forecast(1))
    assert run(gate, line(0.1), warmup=8) == "f" * 8
    assert gate.error is not None and gate.history._xs == XS[:-3:-1]


def test_the_ends_of_the_threshold():
    assert run(Confidence(math.inf, Forecast(1)), line(9.0), warmup=0) == "f" + "p" * 7
    assert run(Confidence(0.0, Forecast(1)), [torch.ones(1, 4)] * 8, warmup=0) == "f" * 8
    assert run(Confidence(9.0, Forecast(1)), [torch.full((1, 4), math.nan)] * 8, warmup=0) == "f" * 8
    zero = Confidence(0.1, Forecast(1))
    assert run(zero, [torch.zeros(1, 4)] * 8, warmup=0) == "f" + "p" * 7 and zero.error == 0


def test_another_size_starts_anew():
    gate = Confidence(1.0, Forecast(1))
    assert run(gate, [torch.ones(1, 4), torch.ones(1, 4), torch.ones(1, 6), torch.ones(1, 6)], warmup=0) == "fpfp"


def test_the_settings_are_checked():
    for settings in ({"metric": "mse"}, {"over": "last"}):
        with pytest.raises(ValueError, match="A confidence gate has metric rel_l1"):
            Confidence(0.1, Forecast(1), **settings)


@pytest.mark.parametrize("over", ["first_stream", "max"])
def test_predicted_change_is_the_true_one_where_the_output_is_linear(over):
    """x moves at a constant speed and o = c x + d: k is c, and the prediction adds up to what o really changed by."""
    start, speed, d = torch.randn(3, 2, 16, 6, 6)
    xs = [start + i * speed for i in range(8)]
    outputs = [2.5 * x + d for x in xs]
    gate, full = Predicted(1e9, over), 1
    for i, x in enumerate(xs):
        now = seen(i, x)
        if gate.computes(now, i < 2):
            gate.computed(now, outputs[i])
        if i < 2:
            assert gate.error is None
        else:
            rows = [(slice(None),)] if over == "first_stream" else [(0,), (1,)]
            want = [(outputs[i][r] - outputs[full][r]).abs().mean() / outputs[full][r].abs().mean() for r in rows]
            assert gate.error == pytest.approx(max(want).item(), rel=1e-5)
    assert gate.bytes_held == 3 * xs[0].nbytes


def test_predicted_change_adds_up_to_the_threshold():
    xs = [torch.full((1, 4), float(i)) for i in range(8)]
    gate, decisions = Predicted(0.35), ""
    for i, x in enumerate(xs):
        now = seen(i, x)
        full = gate.computes(now, i < 2)
        decisions += "f" if full else "p"
        if full:
            gate.computed(now, x + 9)  # changes by a tenth of itself or less a step: 1 / 10, 1 / (9 + i) after step i
    assert decisions == "ffpppfpp"
    assert run(Predicted(math.inf), [torch.full((1, 4), math.nan)] * 8) == "f" * 8  # nothing was told: never known
