import math

import pytest
import torch

from tessera.methods.cache.taylor import BASES, Forecast, allowed_order, allowed_variable, weights

EXACT = ("taylor_paper", "newton")  # both continue a line; hermite halves its slope
IRREGULAR = [1.0, 0.93, 0.8, 0.72, 0.5, 0.41, 0.2]  # falling sigmas


def fill(forecast, xs, f):
    for x in xs:
        forecast.update(f(x), x)
    return forecast


def paper(xs, features, order, x):
    """The recursion as the paper's code runs it: all of the history from the first evaluation on, double precision."""
    levels = [features[0].double()]
    for before, now, feature in zip(xs, xs[1:], features[1:], strict=False):
        new = [feature.double()]
        for i in range(min(order, len(levels))):
            new.append((new[i] - levels[i]) / (now - before))
        levels = new
    return sum(d * (x - xs[-1]) ** i / math.factorial(i) for i, d in enumerate(levels))


@pytest.mark.parametrize("order", range(5))
def test_paper_recursion_is_reproduced(order, error):
    xs = [0.0, 1.0, 2.0, 8.0, 14.0, 20.0, 21.5]
    features = [torch.randn(3, 5, dtype=torch.float64) for _ in xs]
    forecast = Forecast(order, "taylor_paper", direction=1)
    for count in range(1, len(xs) + 1):
        forecast.update(features[count - 1], xs[count - 1])
        for k in (0.0, 1.0, 4.5):
            x = xs[count - 1] + k
            assert error(forecast.predict(x), paper(xs[:count], features[:count], order, x)) < 1e-10


def test_paper_error_on_a_square_is_c_n_k():
    c, n, k = 3.0, 5.0, 3.0
    forecast = fill(Forecast(2, direction=1), [0, n, 2 * n], lambda t: torch.tensor([c * t**2], dtype=torch.float64))
    assert c * (2 * n + k) ** 2 - forecast.predict(2 * n + k).item() == pytest.approx(c * n * k)  # 45


def test_paper_error_on_a_cube_at_order_three():
    forecast = fill(
        Forecast(3, direction=1), [0, 5, 10, 15], lambda t: torch.tensor([float(t**3)], dtype=torch.float64)
    )
    backward = 15**3 + 475 * 3 + 60 * 3**2 / 2 + 6 * 3**3 / 6  # third differences of t^3 at spacing 5
    assert forecast.predict(18).item() == pytest.approx(backward) and backward != 18**3


@pytest.mark.parametrize("order", range(5))
def test_newton_is_exact_to_its_degree_on_any_spacing(order, error):
    coefficients = torch.randn(order + 1, 4, 6, dtype=torch.float64)

    def f(x):
        return sum(c * x**i for i, c in enumerate(coefficients))

    forecast = fill(Forecast(order, "newton"), IRREGULAR, f)
    for x in (0.19, 0.1, 0.0):
        assert error(forecast.predict(x), f(x)) < 1e-8
    beyond = fill(Forecast(order, "newton"), IRREGULAR, lambda x: f(x) + 50 * torch.ones(4, 6) * x ** (order + 1))
    assert error(beyond.predict(0.0), f(0.0)) > 1e-6


@pytest.mark.parametrize("order", range(5))
def test_hermite_is_the_differences_under_scaled_hermite_polynomials(order, error):
    """Written out: H_1 = 2u, H_2 = 4u^2 - 2, H_3 = 8u^3 - 12u, H_4 = 16u^4 - 48u^2 + 12, at u = k / 2."""
    xs = [0.0, 1.0, 2.0, 8.0, 14.0]
    features = [torch.randn(3, 5, dtype=torch.float64) for _ in xs]
    forecast = Forecast(order, "hermite", direction=1)
    for x, feature in zip(xs, features, strict=True):
        forecast.update(feature, x)
    for k in (0.0, 1.0, 4.0):
        levels, u = [], k / 2
        for i in range(order + 1):  # D_i: what order i adds to the paper's sum one step ahead
            last = paper(xs, features, i, xs[-1] + 1) - (paper(xs, features, i - 1, xs[-1] + 1) if i else 0)
            levels.append(last * math.factorial(i))
        h = [1.0, 2 * u, 4 * u**2 - 2, 8 * u**3 - 12 * u, 16 * u**4 - 48 * u**2 + 12]
        want = sum(levels[i] * 0.5**i * h[i] / math.factorial(i) for i in range(order + 1))
        assert error(forecast.predict(xs[-1] + k), want) < 1e-10
    assert sum(weights("hermite", xs[::-1], 17.0)) == pytest.approx(1)


def test_hermite_counts_steps():
    assert allowed_variable("hermite", "auto") == "auto" and allowed_variable("newton", "sigma") == "sigma"
    with pytest.raises(ValueError, match="count steps, not sigmas"):
        allowed_variable("hermite", "sigma")


@pytest.mark.parametrize("basis", EXACT)
def test_linear_trajectory_is_exact_in_single_precision(basis, error):
    a, b = torch.randn(2, 64, 32)
    forecast = fill(Forecast(1, basis), IRREGULAR, lambda x: a + b * x)
    for x in (0.15, 0.05, 0.0):
        assert error(forecast.predict(x), a + b * x) < 1e-6


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_order_zero_reuses_bit_for_bit(basis, dtype):
    forecast, newest = Forecast(0, basis), torch.randn(7, 9).to(dtype)
    forecast.update(torch.randn(7, 9).to(dtype), 1.0)
    forecast.update(newest, 0.8)
    got = forecast.predict(0.1)
    assert torch.equal(got, newest) and got.dtype == dtype


@pytest.mark.parametrize("basis", EXACT)
def test_weights_sum_to_one_and_return_the_newest_at_its_own_x(basis):
    assert sum(weights(basis, IRREGULAR[4::-1], 0.3)) == pytest.approx(1)
    assert weights(basis, IRREGULAR[4::-1], 0.5) == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("basis", BASES)
def test_order_grows_with_the_history_and_memory_stops(basis):
    forecast, size = Forecast(2, basis), 6 * 4 * 4
    assert (forecast.levels, forecast.bytes_held) == (0, 0)
    stored = []
    for i, x in enumerate(IRREGULAR):
        forecast.update(torch.full((6, 4), float(i)), x)
        stored.append(forecast.bytes_held)
        assert forecast.levels == min(i + 1, 3)
    assert stored == [size, 2 * size] + [3 * size] * 5
    forecast.reset()
    assert (forecast.levels, forecast.bytes_held) == (0, 0)


@pytest.mark.parametrize("basis", BASES)
def test_a_repeated_sigma_replaces_the_newest_entry(basis):
    # heun: the second call of a step and the first of the next share a sigma, with different inputs
    first, second = torch.randn(2, 5, 3)
    calls = [(1.0, torch.ones(5, 3)), (0.7, torch.zeros(5, 3)), (0.5, first), (0.5 + 4e-7, second)]
    replaced, plain = Forecast(2, basis), Forecast(2, basis)
    for x, feature in calls:
        replaced.update(feature, x)
    for x, feature in [*calls[:2], calls[3]]:
        plain.update(feature, x)
    assert replaced.levels == 3
    assert torch.equal(replaced.predict(0.4), plain.predict(0.4)) and replaced.predict(0.4).isfinite().all()


def test_tolerance_follows_the_scale():
    wide, narrow = Forecast(1, scale=1000.0), Forecast(1, scale=1.0)
    for forecast in (wide, narrow):
        forecast.update(torch.zeros(3), 0.5)
        forecast.update(torch.ones(3), 0.4995)
    assert (wide.levels, narrow.levels) == (1, 2)


def test_x_running_backwards_starts_a_new_history():
    falling = fill(Forecast(2), [1.0, 0.5, 0.3], torch.tensor)
    assert falling.serves(0.2) and falling.serves(0.3) and not falling.serves(0.8)
    falling.update(torch.tensor(0.8), 0.8)
    assert falling.levels == 1
    rising = fill(Forecast(2, direction=1), [0, 1, 2], lambda x: torch.tensor(float(x)))
    assert rising.levels == 3
    rising.update(torch.tensor(1.0), 1)
    assert rising.levels == 1


def test_another_shape_or_dtype_starts_a_new_history():
    forecast = fill(Forecast(1), [1.0, 0.9], lambda x: torch.full((2, 3), x))
    assert forecast.serves(0.8, torch.empty(2, 3))
    assert not forecast.serves(0.8, torch.empty(2, 4)) and not forecast.serves(0.8, torch.empty(2, 3).half())
    forecast.update(torch.zeros(2, 4), 0.8)
    assert forecast.levels == 1 and forecast.predict(0.7).shape == (2, 4)
    forecast.update(torch.zeros(2, 4, dtype=torch.bfloat16), 0.6)
    assert forecast.levels == 1 and forecast.predict(0.5).dtype == torch.bfloat16


def test_the_history_shares_no_memory_with_what_it_is_given_or_gives():
    # ControlNet adds in place to the tensors that block hooks return
    forecast, feature = Forecast(1), torch.randn(4, 4).T
    forecast.update(feature, 1.0)
    kept = feature.clone()
    feature.add_(7)
    forecast.predict(0.9).add_(7)
    assert torch.equal(forecast.predict(0.9), kept)
    assert forecast.predict(0.9).is_contiguous()


def test_cache_dtype(error):
    a, b = torch.randn(2, 16, 16)
    forecast = fill(Forecast(1, cache_dtype=torch.bfloat16), [1.0, 0.9], lambda x: a + b * x)
    assert forecast.bytes_held == 2 * 16 * 16 * 2
    got = forecast.predict(0.8)
    assert got.dtype == torch.float32
    assert 1e-5 < error(got, a + b * 0.8) < 2e-2
    low = fill(Forecast(1, cache_dtype=torch.float32), [1.0, 0.9], lambda x: (a + b * x).bfloat16())
    assert low.bytes_held == 2 * 16 * 16 * 4 and low.predict(0.8).dtype == torch.bfloat16


def test_cache_device_holds_the_tensors():
    forecast = Forecast(1, cache_device="meta")
    forecast.update(torch.randn(4), 1.0)
    assert [feature.device.type for feature in forecast._features] == ["meta"]


@pytest.mark.gpu
def test_offload_returns_to_the_gpu(error):
    a, b = torch.randn(2, 33, 7, device="cuda")
    held, away = (fill(Forecast(1, cache_device=d), [1.0, 0.9], lambda x: a + b * x) for d in (None, "cpu"))
    assert {feature.device.type for feature in away._features} == {"cpu"}
    assert away.predict(0.7).device == a.device
    assert error(away.predict(0.7), held.predict(0.7)) < 1e-6


def test_inference_tensors_are_stored():
    forecast = Forecast(1)
    with torch.inference_mode():
        for x in IRREGULAR:
            forecast.update(torch.full((3,), x), x)
        assert torch.allclose(forecast.predict(0.0), torch.zeros(3), atol=1e-6)


def test_nothing_stored_is_an_error():
    forecast = Forecast()
    assert not forecast.serves(0.5)
    with pytest.raises(RuntimeError, match="no feature"):
        forecast.predict(0.5)


def test_settings_are_checked():
    assert allowed_order("newton", 2, 20) == 2 and allowed_order("newton", 4, 3) == 4
    assert allowed_order("taylor_paper", 4, 20) == 4
    for call, sentence in [
        (lambda: allowed_order("newton", 3, 5), "order 2 or less"),
        (lambda: allowed_order("taylor_paper", 5, 2), "0 to 4, got 5"),
        (lambda: Forecast(-1), "got -1"),
        (lambda: Forecast(1, "chebyshev"), "taylor_paper, newton, hermite"),
        (lambda: Forecast(1, direction=0), "direction"),
        (lambda: Forecast(1, scale=0.0), "scale"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            call()
