"""Calibrations: what their numbers mean, on features whose answers are known."""

import numpy as np
import pytest
import torch

from tessera.methods.cache.calibration import Calibration, Recorder, polynomial

SIGMAS = (1.0, 0.8, 0.55, 0.4, 0.1)


def record(features, befores=None, seed=0, signals=None, variable="sigma"):
    recorder = Recorder(seed)
    for i, after in enumerate(features):
        before = recorder.keep(torch.zeros_like(after) if befores is None else befores[i])
        signal = before if signals is None else recorder.keep_signal(signals[i])
        recorder.add(before, signal, after)
    return recorder.finish("model", "sample_euler", SIGMAS[: len(features)], variable, "last_block", "input")


def walk(tokens=40, width=16):
    generator = torch.Generator().manual_seed(3)
    steps = torch.randn(len(SIGMAS), tokens, width, generator=generator) * 0.3
    return list(steps.cumsum(0) + 1)


def test_numbers_are_those_of_the_features():
    features = walk()
    found = record(features)
    for i, a in enumerate(features):
        for j, b in enumerate(features):
            assert found.rel_l1[i][j] == pytest.approx(float((a - b).abs().mean() / b.abs().mean()), abs=1e-5)
            assert found.cosine[i][j] == pytest.approx(float(torch.cosine_similarity(a, b, -1).mean()), abs=1e-5)
    slope = (features[2] - features[0]) / (SIGMAS[2] - SIGMAS[0])
    guess = features[2] + slope * (SIGMAS[4] - SIGMAS[2])
    want = (guess - features[4]).norm() / features[4].norm()
    assert found.forecast_error((2, 0), 4) == pytest.approx(float(want), rel=1e-5)
    assert found.forecast_error((2,), 4) == pytest.approx(
        float((features[2] - features[4]).norm() / features[4].norm()), rel=1e-5
    )


def test_forecasts_of_a_line_are_exact_in_their_variable():
    base, slope = torch.randn(50, 8), torch.randn(50, 8)
    line = [base + sigma * slope for sigma in SIGMAS]
    assert record(line).forecast_error((1, 0), 4) < 1e-5
    assert record(line, variable="step").forecast_error((1, 0), 4) > 1e-2


def test_the_projection_keeps_errors():
    features = walk(2000, 512)
    found = record(features)
    for i, j in ((0, 1), (0, 4), (3, 4)):
        want = float((features[i] - features[j]).norm() / features[j].norm())
        assert found.forecast_error((i,), j) == pytest.approx(want, rel=0.05)
        assert found.cosine[i][j] == pytest.approx(
            float(torch.cosine_similarity(features[i], features[j], -1).mean()), abs=0.05
        )
    assert record(features) == found
    assert record(features, seed=1) != found


def test_magcache_ratios():
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(30, 8, generator=generator)
    befores = [torch.randn(30, 8, generator=generator) for _ in range(4)]
    lengths = (1.0, 1.1, 0.55, 0.0)
    found = record([b + n * residual for b, n in zip(befores, lengths, strict=True)], befores)
    assert found.mag_ratios == pytest.approx((1.0, 1.1, 0.5, 0.0), abs=1e-5)


def test_teacache_polynomial_is_recovered():
    signal = np.linspace(0.02, 0.3, 12)
    wanted = (40.0, -20.0, 3.0, 0.5, 0.01)
    assert polynomial(signal, np.polyval(wanted, signal)) == pytest.approx(wanted, rel=1e-6)
    assert polynomial(signal[:4], signal[:4]) == ()
    assert polynomial([0.1] * 9, [0.2] * 9) == ()
    factors = np.cumprod(np.concatenate(([1.0], 1 + signal)))  # a signal that changes by these parts
    outputs = np.cumprod(np.concatenate(([1.0], 1 + np.polyval(wanted, signal))))
    one = torch.ones(20, 8)
    recorder = Recorder()
    for a, b in zip(factors, outputs, strict=True):
        before = recorder.keep(one)
        recorder.add(before, recorder.keep_signal(one[:3] * float(a)), one * float(b))
    found = recorder.finish("", "", [1 - i / 13 for i in range(13)], "sigma", "last_block", "modulated")
    assert found.signal_change == pytest.approx((0.0, *signal), abs=1e-5)
    assert found.output_change == pytest.approx((0.0, *np.polyval(wanted, signal)), rel=1e-4)
    assert np.polyval(found.tea_coefficients, signal) == pytest.approx(np.polyval(wanted, signal), rel=1e-3)


def test_json_round_trip_and_what_is_none():
    found = record(walk())
    assert Calibration.from_json(found.to_json()) == found
    broken = found.to_json().replace('"sigmas": [1.0, ', '"sigmas": [')
    for text in ("", "[]", "{}", '{"format": "tessera-calibration/1"}', broken):
        with pytest.raises(ValueError, match="This is no cache calibration .* Make one with Calibrate Cache"):
            Calibration.from_json(text)


def test_a_size_that_changes_is_refused():
    recorder = Recorder()
    recorder.keep(torch.zeros(10, 4))
    with pytest.raises(ValueError, match=r"tokens \(12, 4\) after \(10, 4\)"):
        recorder.keep(torch.zeros(12, 4))
