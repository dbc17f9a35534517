"""The gates of Step Cache on scripted signals, against decisions made by hand, and FoCa's forecasts."""

import numpy as np
import pytest
import torch

from tessera.methods.cache.easycache import EasyCache
from tessera.methods.cache.first_blocks import FirstBlocks
from tessera.methods.cache.foca import FoCa
from tessera.methods.cache.gate import Seen
from tessera.methods.cache.magcache import MagCache, ratios_for
from tessera.methods.cache.teacache import TeaCache, parsed, polynomial

FLUX = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)


def decide(gate, seen: list[Seen], forced=()) -> str:
    """One letter an evaluation: f computed, s skipped. Computed ones are told the sum of what was seen."""
    made = ""
    for number, one in enumerate(seen):
        full = gate.computes(one, number in forced)
        made += "f" if full else "s"
        if full and one.now is not None:
            gate.computed(one, one.now * 2 + 1)
    return made


def signals(values, **rest) -> list[Seen]:
    """Evaluations at which the modulated input is constant at each value."""
    tensors = [torch.full((1, 4, 8), float(v)) for v in values]
    return [Seen(i, i, i, 1.0, modulated=lambda t=t: t, **rest) for i, t in enumerate(tensors)]


def teacache(threshold, coefficients=(1.0, 0.0)):
    return TeaCache(threshold, lambda: ("the test", coefficients))


@pytest.mark.parametrize("coefficients", [FLUX, (2.0,), (1.0, -3.0), (0.0, 0.0, 5.0, -0.1)])
def test_the_polynomial_is_numpys(coefficients):
    for x in np.linspace(-0.5, 1.5, 41):
        assert polynomial(coefficients, x) == pytest.approx(np.polyval(coefficients, x), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("text", ["498.65 -283.78 1e-1", "[498.65, -283.78, .1]", " (498.65,-283.78,0.1) "])
def test_typed_coefficients(text):
    assert parsed(text) == (498.65, -283.78, 0.1)


@pytest.mark.parametrize("text", ["", "[]", "a, b", "1; 2", "1, two"])
def test_text_that_is_no_list(text):
    with pytest.raises(ValueError, match="highest power first"):
        parsed(text)


def test_teacache():
    """Changes .1 .1 .1 .3 0 0 .2 .1: sums .1 .2 .3>=.25 | .3 | 0 0 .2 .3."""
    values = [1.0]
    for change in (0.1, 0.1, 0.1, 0.3, 0.0, 0.0, 0.2, 0.1):
        values.append(values[-1] * (1 + change))
    assert decide(teacache(0.25), signals(values)) == "fssffsssf"


def test_teacache_compares_with_the_evaluation_before_even_where_it_is_forced():
    """A forced one empties the sum and moves the reference: .2 | .2 forced | .2 .2."""
    values = [1.0, 1.2, 1.44, 1.728, 2.0736]
    assert decide(teacache(0.3), signals(values)) == "fsfsf"
    assert decide(teacache(0.3), signals(values), forced={1}) == "ffsfs"
    assert decide(teacache(0.5), signals(values), forced={2}) == "fsfss"


def test_teacache_takes_what_the_polynomial_gives_without_its_sign():
    gate = teacache(0.25, (-1.0, 0.0))
    assert decide(gate, signals([1.0, 1.1, 1.21, 1.331])) == "fssf"
    assert gate.error == pytest.approx(0.1, rel=1e-5) and gate.facts == {"coefficients": "the test"}


def test_teacache_on_flux_settings_against_the_formula():
    """The published rule, written out with numpy."""
    changes = np.random.default_rng(0).uniform(0.01, 0.12, 49)
    values = np.cumprod(np.concatenate([[1.0], 1 + changes]))
    want, total = "f", 0.0
    for change in changes:
        total += abs(np.polyval(FLUX, change))
        want += "s" if total < 0.4 else "f"
        total = 0.0 if want[-1] == "f" else total
    got = decide(teacache(0.4, FLUX), [*signals(values)])
    assert got == want and 10 < got.count("s") < 45


def test_teacache_after_another_token_count():
    gate = teacache(9.0)
    assert decide(gate, signals([1.0, 1.1])) == "fs"
    assert gate.computes(Seen(2, 2, 2, 1.0, modulated=lambda: torch.ones(1, 5, 8)), False)


def test_first_blocks():
    """r 1, 1.05, 1.09, 1.2, 1.25 at 0.1: each is compared with the last computed r, not with the one before."""

    def seen(r):
        return Seen(0, 0, 0.0, 1.0, before=torch.ones(1, 3, 2), now=torch.ones(1, 3, 2) + r)

    steps = [seen(r) for r in (1.0, 1.05, 1.09, 1.2, 1.25, 1.4)]
    assert decide(FirstBlocks(0.1), steps) == "fssfsf"
    assert decide(FirstBlocks(0.1), steps, forced={1, 2}) == "ffffsf"  # 1.2 / 1.09 - 1 = .101
    gate = FirstBlocks(0.1)
    assert decide(gate, [seen(1.0), seen(1.05)]) == "fs" and gate.error == pytest.approx(0.05, abs=1e-5)
    assert gate.bytes_held == 6 * 4


def at_steps(count, each=1):
    return [Seen(i // each, i, i // each, 1.0) for i in range(count)]


@pytest.mark.parametrize("most", [1, 2, 5])
def test_magcache_with_ratios_of_one_skips_exactly_k_in_a_row(most):
    got = decide(MagCache(0.06, [1.0] * 24, most), at_steps(24), forced={0})
    assert got == (("f" + "s" * most) * 24)[:24]


def test_magcache():
    """gammas .98 .97 .99 .9 1.02 1: R .98 .9506 .9411.. sums .02 .0694>=.06 | .01 .11 | .02 .02+.02 ..."""
    ratios = [1.0, 0.98, 0.97, 0.99, 0.9, 1.02, 1.0, 1.0, 1.0]
    # 1: .02; 2: .02 + .0494 = .0694 full; 3: .01; 4: .01 + .109 full; 5: .02; 6: .04; 7: .06 full; 8: 0
    assert decide(MagCache(0.06, ratios), at_steps(9), forced={0}) == "fsfsfssfs"
    assert decide(MagCache(0.06, ratios, most=1), at_steps(9), forced={0}) == "fsfsfsfsf"


def test_magcache_retains_the_start():
    got = decide(MagCache(0.5, [1.0] * 25, retention=0.2), at_steps(25))
    assert got == "f" * 5 + "s" * 20


def test_magcache_counts_a_step_of_two_evaluations_once_on_its_curve():
    gate = MagCache(1.0, [1.0, 0.9, 0.8])
    assert decide(gate, at_steps(4, each=2), forced={0, 1}) == "ffss"
    assert gate.error == pytest.approx(0.1)


def test_ratios_are_matched_by_sigma_and_without_sigmas_by_place():
    ratios, sigmas = [1.0, 0.9, 0.8, 0.7], [1.0, 0.75, 0.5, 0.25]
    assert ratios_for(ratios, sigmas, [0.8, 0.6, 0.45, 0.1]) == [0.9, 0.8, 0.8, 0.7]
    assert ratios_for(ratios, sigmas, sigmas) == ratios
    assert ratios_for(ratios, (), range(7)) == [1.0, 1.0, 0.9, 0.8, 0.8, 0.8, 0.7]
    assert ratios_for(ratios, (), range(2)) == [1.0, 0.7]
    with pytest.raises(ValueError, match="at least one"):
        ratios_for([], [], [1.0])


def easy(x, slope=-3.0, offset=0.5):
    """Evaluations of a model that is linear in an input that moves steadily."""
    out = []
    for i, value in enumerate(x):
        out.append(Seen(i, i, i, 1.0, now=torch.full((1, 2, 4, 4), float(value), dtype=torch.float64)))
    return out, lambda seen: seen.now * slope + offset


def test_easycache_expects_the_true_change():
    steps, model = easy(np.linspace(2.0, 1.0, 11))
    gate = EasyCache(1e-9)
    outputs = [model(one) for one in steps]
    for i, one in enumerate(steps):
        assert gate.computes(one, False)
        if i >= 2:
            change = (outputs[i] - outputs[i - 1]).abs().mean() / outputs[i - 1].abs().mean()
            assert gate.error == pytest.approx(float(change), rel=1e-6)
        gate.computed(one, outputs[i])


def test_easycache():
    """|o| is 8 -> k |dx| / |o'| = 1 / 8 at each step of 1 with slope 1, the sum starts anew after each computed one."""
    steps, _ = easy(range(8))
    gate, made = EasyCache(0.3), ""
    for one in steps:
        full = gate.computes(one, False)
        made += "f" if full else "s"
        if full:
            gate.computed(one, one.now * 0 + 8 + (one.step % 2))  # changes by 1 between an even and an odd step
    # k is 1 after 0 and 1; o' is 9: .111 .222 .333 full at 4 (o 8, k 1/3): .0417 .0833 .125
    assert made == "ffssfsss"


def test_easycache_with_a_repeated_input_keeps_its_rate():
    steps, model = easy([3.0, 2.0, 2.0, 1.0])
    gate = EasyCache(1e-9)
    for one in steps:
        assert gate.computes(one, True)
        gate.computed(one, model(one))
    assert gate.error == pytest.approx(3.0 / 5.5, rel=1e-6)


def history(**rest) -> FoCa:
    return FoCa(direction=1, scale=20.0, **rest)


def told(gate: FoCa, plan):
    """Forecasts at the numbers of a plan; computed features come as (x, value)."""
    out = []
    for part in plan:
        if isinstance(part, tuple):
            gate.update(torch.full((3, 2), part[1], dtype=torch.float64), part[0])
        else:
            out.append(gate.predict(part)[0, 0].item())
    return out


def by_hand(plan):
    """The formula with scalars: x, value of the last two values and of the last two computed features."""
    values, computed, out = [], [], []
    for part in plan:
        if isinstance(part, tuple):
            values, computed = [*values, part], [*computed, part]
            continue
        (x0, f0), (x1, f1) = values[-1], values[-2]
        (c0, g0), (c1, g1) = computed[-1], computed[-2]
        value = f0 + (part - x0) * ((f0 - f1) / (x0 - x1) + (g0 - g1) / (c0 - c1)) / 2
        values.append((part, value))
        out.append(value)
    return out


PLANS = [
    [(0, 1.0), (1, 2.0), 2, 3, 4],
    [(0, 1.0), (1, 3.0), 2, 3, (4, 5.0), 5, 6, (7, 4.0), 8, 9, 10],
    [(0, 1.0), (1.5, -2.0), 2, 4.5, (5, 1.0), (6, 0.0), 9, 9.5, (10, 2.0), (11.5, 7.0), (13, 1.0), 14, 20],
]


@pytest.mark.parametrize("plan", PLANS)
def test_foca_against_the_formula(plan):
    gate = history()
    assert told(gate, plan) == pytest.approx(by_hand(plan), rel=1e-9)
    assert gate.bytes_held <= 3 * 6 * 8


def test_foca_with_equal_steps_is_the_form_of_cache_dit():
    """2 F_k - F_{k-1} + ((F_full - F_full') - (F_k - F_{k-1})) / 2."""
    values = [1.0, 4.0, 2.0, 9.0]  # every evaluation computed at x = 0, 1, then skipped twice, computed at 4
    gate = history()
    one, two = told(gate, [(0, values[0]), (1, values[1]), 2, 3])
    assert one == 2 * 4 - 1 + 0.0
    assert two == 2 * one - 4 + ((4 - 1) - (one - 4)) / 2


def test_foca_is_exact_on_a_line_and_asked_twice_gives_the_same():
    gate = history()
    plan = [(0.0, 1.0), (1.0, 3.0), 2.5, 4.0, (5.0, 11.0), 6.0, 6.0, 7.0]
    assert told(gate, plan) == pytest.approx([6.0, 9.0, 13.0, 13.0, 15.0])


def test_foca_with_one_feature_reuses_it_and_starts_anew_after_a_restart():
    gate = history()
    assert told(gate, [(0, 5.0), 1, 2, (3, 8.0), 4]) == pytest.approx([5.0, 5.0, 9.0])
    assert told(gate, [(0, 2.0), 1]) == [2.0]  # x went back
    gate.reset()
    assert gate.bytes_held == 0
    with pytest.raises(RuntimeError, match="no feature"):
        gate.predict(1.0)


def test_foca_replaces_a_feature_at_the_same_x():
    a, b = history(), history()
    one = told(a, [(0, 1.0), (1, 2.0), 2, (3, 9.0), (3, 5.0), 4, 5])
    two = told(b, [(0, 1.0), (1, 2.0), 2, (3, 5.0), 4, 5])
    assert one == pytest.approx(two)


def test_foca_stores_in_the_dtype_of_the_cache():
    gate = history(cache_dtype=torch.bfloat16, cache_device="cpu")
    gate.update(torch.ones(4), 0)
    gate.update(torch.ones(4) * 2, 1)
    made = gate.predict(2)
    assert made.dtype == torch.float32 and torch.equal(made, torch.full((4,), 3.0)) and gate.bytes_held == 2 * 4 * 2
