"""The choice of rotation and smoothing by the measured error, on inputs whose answer is known."""

import pytest
import torch
from quant_helper import planted, relative_mse, rows

from tessera.methods.quant.adaptive import AUTO, GAIN, choose, importance_of, output_error
from tessera.methods.quant.calibration import LayerStatistics
from tessera.methods.quant.layer import quantize_layer
from tessera.methods.quant.rotation import Rotation, rotation
from tessera.methods.quant.round_trip import activations, weights

N, K = 96, 256
TWO, EIGHT = {3: 60.0, 200: 40.0}, dict.fromkeys(range(0, K, 64), 20.0)
ONE_BLOCK = dict.fromkeys(range(5), 30.0)


def seen(outliers, tokens=2000, channels=K):
    s = LayerStatistics(channels)
    s.add(planted(tokens, channels, outliers))
    return s


@pytest.mark.parametrize("kind", ["none", "int4"])
@pytest.mark.parametrize("outliers", [TWO, EIGHT, ONE_BLOCK], ids=["two", "eight", "one block"])
def test_the_bar_on_planted_outliers(outliers, kind):
    """Root mean square of the output's error, on inputs that the choice never saw, against plain integers."""
    w, fresh = rows("gauss", N, K) * 0.02, planted(400, K, outliers, seed=9)
    want = fresh @ w.T
    plain = relative_mse(activations(fresh, kind) @ weights(w, "int4_g64")[0].T, want)
    layer = quantize_layer(w, "tlq4", kind, statistics=seen(outliers))
    assert (relative_mse(layer(fresh), want) / plain) ** 0.5 <= 0.7 * 0.7
    turned = quantize_layer(w, "tlq4", kind, statistics=seen(outliers), rotate="zigzag_hadamard")
    assert turned.rotation.kind == "zigzag_hadamard" and (relative_mse(turned(fresh), want) / plain) ** 0.5 <= 0.7


@pytest.mark.parametrize("kind", ["none", "int8", "int4"])
def test_takes_the_least_error_of_what_it_tried(kind):
    found = choose(rows("gauss", N, K), "tlq4", kind, statistics=seen(EIGHT))
    turns = {label.split(",")[0] for label in found.errors}
    assert turns == {"none", *AUTO}
    label = found.rotation.kind if found.smooth is None else min(found.errors, key=found.errors.get)
    assert label.startswith(found.rotation.kind) and found.errors[label] <= min(found.errors.values()) / GAIN


def test_quantized_tokens_with_outliers_are_rotated_and_smoothed():
    found = choose(rows("gauss", N, K), "tlq4", "int4", statistics=seen(EIGHT))
    assert (
        found.rotation.kind != "none"
        and found.smooth is not None
        and found.errors["none"] > 4 * min(found.errors.values())
    )
    assert found.smooth[64] / found.smooth[65] > 2
    assert found.rule == "zigzag_hadamard" and found.salience == pytest.approx(20, rel=0.3)


def test_even_inputs_of_a_weight_only_layer_are_left_alone():
    found = choose(rows("gauss", N, K), "tlq4", "none", statistics=seen({}))
    assert found.rotation.kind == "none" and found.smooth is None
    assert found.rule == "hadamard_regular" and found.salience < 2 and 0 < found.fluctuation < 0.3


def test_outliers_within_one_block_are_dealt_over_all():
    found = choose(rows("gauss", N, 2 * K), "tlq4", "int4", statistics=seen(ONE_BLOCK, channels=2 * K), alphas=())
    assert found.rotation.kind == "zigzag_hadamard"
    assert found.errors["zigzag_hadamard"] < 0.95 * found.errors["hadamard_regular"]


def test_only_what_may_be_chosen_is_tried():
    w, s = rows("gauss", N, K), seen(TWO)
    assert set(choose(w, "tlq4", "int4", statistics=s, rotations=("hadamard_regular",), alphas=()).errors) == {
        "hadamard_regular"
    }
    some = choose(w, "tlq4", "int4", statistics=s, rotations=("none",), alphas=(0.5,))
    assert set(some.errors) == {"none", "none, 0.5"}


def test_widths_that_no_block_divides_are_only_smoothed():
    found = choose(rows("gauss", N, 200), "tlq4", "int4", statistics=seen({3: 50.0}, channels=200))
    assert found.rotation.kind == "none" and found.smooth is not None and {k[:4] for k in found.errors} == {"none"}
    assert choose(rows("gauss", N, 200), "tlq4", "int4").rotation.kind == "none"


def test_is_the_same_each_time():
    w, s = rows("gauss", 300, K), seen(TWO)
    one, two = (choose(w, "tlq4", "int4", statistics=s) for _ in range(2))
    assert one.errors == two.errors and torch.equal(one.smooth, two.smooth)


def test_without_a_calibration_quantized_tokens_get_the_regular_rotation():
    for kind in ("int8", "fp8", "int4"):
        found = choose(rows("gauss", N, K), "tlq4", kind)
        assert found.rotation.kind == "hadamard_regular" and found.smooth is None and not found.rule
    assert choose(rows("gauss", N, K), "tlq4", "int4", rotations=("none",)).rotation.kind == "none"


def test_without_a_calibration_weights_alone_are_rotated_where_it_lowers_their_error():
    w = rows("gauss", N, K)
    assert choose(w, "tlq4").rotation.kind == "none"
    w[:, ::64] *= 12  # one large column a group
    found = choose(w, "tlq4")
    assert found.rotation.kind in ("hadamard_regular", "hadamard_random")
    assert found.errors[found.rotation.kind] < 0.9 * found.errors["none"] and "zigzag_hadamard" not in found.errors


def test_statistics_without_rows_count_as_none():
    s = LayerStatistics(K, rows=0)
    s.add(planted(50, K, TWO))
    assert choose(rows("gauss", N, K), "tlq4", "int4", statistics=s).rotation.kind == "hadamard_regular"


def test_the_error_is_that_of_the_whole_path():
    w, x, turn = rows("gauss", N, K), planted(64, K, TWO), rotation("hadamard_regular", K)
    smooth = torch.rand(K) + 0.5
    near = weights(turn.apply(w * smooth), "int8_row")[0]
    want = relative_mse(activations(turn.apply(x / smooth), "int8") @ near.T, x @ w.T)
    assert output_error(w, x, "int8_row", "int8", turn, smooth) == pytest.approx(want, rel=1e-4)
    assert output_error(w, x, "none", "none", turn, smooth) < 1e-9


def test_importance_follows_smoothing_and_rotation():
    squares, smooth = torch.rand(K) + 0.1, torch.rand(K) + 0.5
    assert importance_of(None, Rotation("none"), smooth) is None
    assert torch.equal(importance_of(squares, Rotation("none"), None), squares)
    assert torch.equal(importance_of(squares, Rotation("none"), smooth), squares / smooth.square())
    assert torch.allclose(importance_of(squares, rotation("hadamard_regular", K), None)[:256], squares[:256].mean())
