import math

import pytest
import torch

from tessera.kernels.rope import tables as m

AXES = (16, 56, 56)
POSITIONS = m.grid_positions((2, 3, 7))


def scaled(method, span, **options):
    return m.Axis(56, 10000.0, method, 64, span, **options)


def yarn(pair, dim, theta, window, span, resonance=True):
    """The released formula for one pair, scalar by scalar."""
    s, w = span / window, theta ** (-2 * pair / dim)
    turns = window * w / (2 * math.pi)
    w = 2 * math.pi * round(turns) / window if resonance and turns >= 1 else w

    def ramp(first, last):
        at = [dim * math.log(window / (2 * math.pi * x)) / (2 * math.log(theta)) for x in (first, last)]
        low, high = max(math.floor(at[0]), 0), min(math.ceil(at[1]), dim - 1, dim // 2)
        return 1 - min(max((pair - low) / (high - low if high != low else 1e-3), 0), 1)

    ntk = (theta * s ** (dim / (dim - 2))) ** (math.log(w) / math.log(theta))
    slow, fast = ramp(1.25, 0.75), ramp(16, 2)
    mixed = w / s * (1 - slow) + ntk * slow
    return mixed * (1 - fast) + w * fast


@pytest.mark.parametrize("theta", [10000, 256])
def test_unscaled_tables_are_comfyuis_bit_for_bit(theta, host):
    from comfy.ldm.flux.layers import EmbedND

    ids = torch.cat((torch.zeros(1, 5, 3), POSITIONS[None] + 0.5), 1)
    want = EmbedND(128, theta, list(AXES))(ids)
    assert torch.equal(m.table(ids, [m.Axis(d, theta) for d in AXES])[:, None], want)
    short = [m.Axis(d, theta, "yarn", 64, 64, True) for d in AXES]  # no longer than trained
    assert torch.equal(m.table(ids, short)[:, None], want)


@pytest.mark.parametrize("span", [65, 96, 128, 160, 256])
@pytest.mark.parametrize("resonance", [True, False])
def test_released_yarn_formula(span, resonance):
    got, magnitude = m.frequencies(scaled("yarn", span, resonance=resonance))
    want = torch.tensor([yarn(i, 56, 1e4, 64, span, resonance) for i in range(28)], dtype=torch.float64)
    assert torch.allclose(got, want, rtol=1e-12, atol=0)
    assert magnitude == pytest.approx(0.1 * math.log(span / 64) + 1)


def test_resonance_gives_whole_turns():
    base, _ = m.frequencies(m.Axis(56))
    turns = m._snapped(base, scaled("yarn", 128)) * 64 / (2 * math.pi)
    assert [round(t, 9) for t in turns[:8].tolist()] == [10, 7, 5, 4, 3, 2, 1, 1]
    assert torch.equal(m._snapped(base, scaled("yarn", 128))[8:], base[8:])
    turns = m._snapped(base, scaled("yarn_paper", 128)) * 64 / (2 * math.pi)
    assert torch.allclose(turns, turns.round(), atol=1e-9) and turns.min() == 1


@pytest.mark.parametrize("resonance", [True, False])
def test_paper_formula(resonance):
    got, magnitude = m.frequencies(scaled("yarn_paper", 160, resonance=resonance))
    for pair in range(28):
        turns = 64 * 1e4 ** (-2 * pair / 56) / (2 * math.pi)
        turns = max(1, math.floor(turns + 0.5)) if resonance else turns
        w, keep = 2 * math.pi * turns / 64, min(max((turns - 1) / 31, 0), 1)
        assert got[pair].item() == pytest.approx((1 - keep) * w / 2.5 + keep * w, rel=1e-12)
    assert magnitude == pytest.approx(1.0916, abs=1e-4)


def test_linear_and_ntk():
    base, _ = m.frequencies(m.Axis(56))
    assert torch.allclose(m.frequencies(scaled("linear", 128))[0], base / 2)
    ntk, magnitude = m.frequencies(scaled("ntk", 128))
    assert ntk[0] == 1 and ntk[-1].item() == pytest.approx(base[-1].item() / 2) and magnitude == 1
    assert torch.equal(m.frequencies(m.Axis(2, 10000.0, "ntk", 64, 128))[0], torch.ones(1, dtype=torch.float64))


def test_magnitude_of_twice_the_window():
    assert m.frequencies(scaled("yarn", 128))[1] == pytest.approx(1.0693, abs=1e-4)
    assert m.frequencies(scaled("yarn", 128, magnify=False))[1] == 1


def test_only_the_long_axis_changes():
    plain = m.table(POSITIONS, [m.Axis(d) for d in AXES])
    long = m.table(POSITIONS, [m.Axis(16), m.Axis(56), scaled("yarn", 128, resonance=True)])
    assert torch.equal(long[:, :36], plain[:, :36]) and not torch.allclose(long[7:, 36:], plain[7:, 36:], atol=1e-3)


def test_grid_positions_and_own_positions():
    assert m.grid_positions((2, 2), (5, 7)).tolist() == [[5, 7], [5, 8], [6, 7], [6, 8]]
    assert m.grid_positions((3,)).tolist() == [[0], [1], [2]]
    copied = torch.cat((POSITIONS, POSITIONS[:4]))  # tokens that take others' places
    got = m.table(copied, [m.Axis(d) for d in AXES])
    assert torch.equal(got[-4:], got[:4])


@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 5e-3)], ids=str
)
def test_apply_turns_neighbouring_channels(dtype, bound, device, error):
    x, freqs = torch.randn(2, 3, 42, 128, device=device).to(dtype), m.table(POSITIONS, [m.Axis(d) for d in AXES])
    omega = torch.cat([m.frequencies(m.Axis(d))[0] for d in AXES])
    which = torch.repeat_interleave(torch.arange(3), torch.tensor([d // 2 for d in AXES]))
    turn = torch.polar(torch.ones(()).double(), POSITIONS.double()[:, which] * omega).to(device)
    want = torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turn).flatten(-2)
    got = m.apply(x, freqs.to(device))
    assert got.dtype == dtype and error(got, want) < bound
    assert error(m._turned(x, freqs.to(device)[None, None]), want) < bound
    assert error(m.apply(x.double(), freqs.to(device).expand(2, -1, -1, -1, -1)), want.double()) < 5e-3


def test_mismatches_are_named():
    for words, given in (
        ("even number", (3,)),
        ("theta above 1", (4, 0.5)),
        ("wavy", (4, 1e4, "wavy")),
        ("positive", (4, 1e4, "ntk", 0)),
    ):
        with pytest.raises(ValueError, match=words):
            m.Axis(*given)
    with pytest.raises(ValueError, match="2 axes"):
        m.table(POSITIONS, [m.Axis(4), m.Axis(4)])
    with pytest.raises(ValueError, match="does not fit"):
        m.apply(torch.zeros(1, 2, 5, 8), torch.zeros(5, 3, 2, 2))
