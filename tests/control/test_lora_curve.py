"""The monotone fit of a response and its inverse."""

import json
import math

import pytest

from tessera.methods.control import lora_curve as m
from tessera.methods.control.lora_chart import chart

MAPS = {
    "saturating": lambda s: 1 - math.exp(-3 * s),
    "late": lambda s: s**3 + 0.05 * s,
    "falling": lambda s: 2 - math.tanh(2 * s),
    "offset": lambda s: 5 + math.sqrt(s + 0.01),
}


def curve(of, strengths=m.DEFAULT):
    return m.Curve("a.safetensors", "difference", strengths, tuple(of(s) for s in strengths))


def r_squared(got, want):
    mean = sum(want) / len(want)
    return 1 - sum((a - b) ** 2 for a, b in zip(got, want, strict=True)) / sum((b - mean) ** 2 for b in want)


@pytest.mark.parametrize("name", MAPS)
def test_the_calibrated_response_is_linear(name):
    """What the true map gives at the strengths of the amounts, against the amounts; before it was not."""
    of = MAPS[name]
    made = curve(of)
    asked = [u for u in (i / 20 for i in range(31)) if u <= made.most]
    got = [(of(made.strength(u)) - of(0)) / (of(1) - of(0)) for u in asked]
    assert r_squared(got, asked) >= 0.99
    assert r_squared([(of(u) - of(0)) / (of(1) - of(0)) for u in asked], asked) < 0.98


def test_amounts_and_strengths_are_inverse():
    made = curve(MAPS["saturating"])
    for s in (0.1, 0.25, 0.6, 1.2, 1.5):
        assert made.strength(made.amount(s)) == pytest.approx(s, abs=1e-6)
    assert made.strength(0.0) == 0.0 and made.strength(1.0) == 1.0, "exactly: then it is the plain LoRA"
    assert made.strength(9.0) == pytest.approx(1.5) and made.most == pytest.approx(made.amount(1.5))


def test_it_passes_through_what_was_measured_and_never_turns():
    made = curve(MAPS["late"])
    assert [made.at(s) for s in made.strengths] == pytest.approx(list(made.responses))
    values = [made.at(i / 200) for i in range(301)]
    assert all(b >= a for a, b in zip(values, values[1:], strict=False))


def test_isotonic_pools_what_is_out_of_order():
    assert m.isotonic([1, 3, 2, 4]) == [1, 2.5, 2.5, 4] and m.isotonic([3, 2, 1]) == [2, 2, 2]
    noisy = m.Curve("a", "motion", (0.0, 0.5, 0.75, 1.0), (0.0, 0.6, 0.5, 1.0))
    assert noisy.fitted == [0.0, 0.55, 0.55, 1.0]
    values = [noisy.at(i / 100) for i in range(101)]
    assert all(b >= a - 1e-12 for a, b in zip(values, values[1:], strict=False))


def test_differences_at_negative_strengths_leave_the_others():
    made = curve(abs, (-1.0, -0.5, *m.DEFAULT))
    assert made.strength(0.5) == pytest.approx(0.5) and made.amount(-0.5) == pytest.approx(-0.5)
    assert made.fitted == made.signed and chart(made).shape[0] == 1
    motion = m.Curve("a", "motion", (-1.0, 0.0, 1.0), (1.0, 2.0, 3.0))
    assert motion.fitted == [1.0, 2.0, 3.0]


def test_behind_the_largest_amount_stands_the_last_strength():
    made = curve(lambda s: min(s, 0.5))
    assert [made.strength(u) for u in (1.0, 1.25, 4.0)] == [1.0, 1.5, 1.5]


def test_two_points_are_a_line():
    made = m.Curve("a", "difference", (0.0, 1.0), (2.0, 4.0))
    assert made.at(0.25) == pytest.approx(2.5) and made.strength(0.25) == pytest.approx(0.25)


def test_json_round_trip():
    made = curve(MAPS["offset"])
    assert m.from_json(made.to_json()) == made


@pytest.mark.parametrize(
    ("held", "sentence"),
    [
        ("{", "no curve of Calibrate"),
        ('{"lora": "a"}', "no curve of Calibrate"),
        ('{"lora": "a", "measure": "motion", "strengths": [0, 1], "responses": [0]}', "1 responses at"),
        ('{"lora": "a", "measure": "motion", "strengths": [1, 0], "responses": [0, 1]}', "rising strengths"),
        ('{"lora": "a", "measure": "motion", "strengths": [0, 1], "responses": [0, NaN]}', "finite"),
        ('{"lora": "a", "measure": "motion", "strengths": [0, 1], "responses": [3, 3]}', "does not change"),
        ('{"lora": "a", "measure": "motion", "strengths": [0, "x"], "responses": [3, 3]}', "finite"),
    ],
)
def test_what_is_no_curve_is_refused(held, sentence):
    with pytest.raises(ValueError, match=sentence):
        m.from_json(held)


@pytest.mark.parametrize("text", ["0, x, 1", "0, 0.5", "1", "0, 1, 1000", "0, 1, nan"])
def test_strengths_that_are_none(text):
    with pytest.raises(ValueError, match="strengths"):
        m.strengths_of(text)


def test_strengths_are_sorted_and_single():
    assert m.strengths_of("1, 0,0.5, 1,-0.5,") == (-0.5, 0.0, 0.5, 1.0)


def test_the_chart_shows_points_fit_and_line():
    picture = chart(curve(lambda s: abs(MAPS["saturating"](s)), (-0.5, *m.DEFAULT)))
    assert picture.ndim == 4 and picture.shape[3] == 3 and picture.min() >= 0 and picture.max() <= 1
    from tessera.methods.control import lora_chart as c

    colours = {tuple(round(255 * float(v)) for v in p) for p in picture.reshape(-1, 3).unique(dim=0)}
    assert {c.FIT, c.MEASURED, c.LINEAR, c.PAPER} <= colours
    assert json.loads(curve(MAPS["late"]).to_json())["lora"] == "a.safetensors"
