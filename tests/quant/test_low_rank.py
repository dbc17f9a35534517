"""Low-rank branches: exact where the rank allows, and the error falls with it."""

import pytest
import torch
from quant_helper import relative_mse, rows

from tessera.methods.quant import low_rank
from tessera.methods.quant.low_rank import leading, low_rank_of, split
from tessera.methods.quant.round_trip import weights


def int4(residual):
    return weights(residual, "int4_g64")[0]


@pytest.mark.parametrize("shape", [(48, 80), (96, 64), (300, 400)])
def test_full_rank_reproduces_the_weight(shape, error):
    w = rows("student5", *shape)
    up, down = leading(w, min(shape))
    assert up.shape == (shape[0], min(shape)) and down.shape == (min(shape), shape[1])
    assert error(up @ down, w) < 1e-5
    up, down, missed = split(w, 10000, int4)
    assert error(up @ down, w) < 1e-5 and missed < 1e-9


def test_the_range_finder_is_nearly_as_good_as_the_decomposition():
    w = rows("gauss", 320, 640) * torch.logspace(0, -1.5, 640)
    up, down = leading(w, 32)
    s = torch.linalg.svdvals(w)
    best = float(s[32:].square().sum() / s.square().sum())
    assert best <= relative_mse(up @ down, w) * (1 + 1e-5) < 1.02 * best
    assert torch.equal(leading(w, 32)[0], up), "the same each time"


def test_the_error_does_not_rise_with_the_rank():
    w = rows("gauss", 128, 256) * torch.logspace(0, -1.5, 256)
    errors = [split(w, r, int4)[2] for r in (0, 1, 2, 4, 8, 16, 32, 64, 128)]
    assert all(b <= a * (1 + 1e-6) for a, b in zip(errors, errors[1:], strict=False)) and errors[6] < 0.7 * errors[0]
    assert errors[0] == pytest.approx(weights(w, "int4_g64")[1].error, rel=1e-3) and errors[-1] < 1e-9


def test_passes_never_raise_the_error_and_it_is_the_one_told():
    w = rows("laplace", 96, 192)
    told = []
    for passes in (1, 2, 4):
        up, down, error = split(w, 16, int4, passes=passes)
        assert relative_mse(up @ down + int4(w - up @ down), w) == pytest.approx(error, rel=1e-3)
        told.append(error)
    assert told[0] >= told[1] >= told[2]


def test_importance_turns_the_branch_to_the_channels_that_matter():
    w, importance = rows("gauss", 96, 192), torch.ones(192)
    importance[:8] = 400

    def miss(up, down, _):
        near = up @ down + int4(w - up @ down)
        return float(((near - w).square() * importance).sum())

    assert miss(*split(w, 8, int4, importance)) < 0.5 * miss(*split(w, 8, int4))


def test_zeros_are_safe():
    w = torch.zeros(32, 64)
    up, down, error = split(w, 8, int4)
    assert not up.any() and not down.any() and error == 0
    up, down = low_rank_of(w)
    assert up.shape == (32, 0) and down.shape == (0, 64) and torch.equal(up @ down, w)


@pytest.mark.parametrize("rank", [1, 4, 16, 17, 40, 64])
def test_finds_the_rank_of_a_lora(rank, error):
    generator = torch.Generator().manual_seed(rank)
    up = torch.randn(320, rank, generator=generator) * torch.logspace(0, -2, rank)
    delta = 0.01 * up @ torch.randn(rank, 256, generator=generator)
    found = low_rank_of(delta, max_rank=64)
    assert found[0].shape == (320, rank) and found[1].shape == (rank, 256) and error(found[0] @ found[1], delta) < 1e-5


def test_two_loras_add_their_ranks_and_a_tolerance_leaves_directions_out(error):
    deltas = [torch.randn(200, 8) @ torch.randn(8, 300) * size for size in (1, 1e-3)]
    assert low_rank_of(sum(deltas))[0].shape[1] == 16
    up, down = low_rank_of(sum(deltas), tolerance=0.01)
    assert up.shape[1] == 8 and error(up @ down, sum(deltas)) < 0.01


def test_what_is_of_higher_rank_gets_none(monkeypatch):
    noise = torch.randn(200, 300)
    assert low_rank_of(noise) is None
    assert low_rank_of(torch.randn(200, 20) @ torch.randn(20, 300), max_rank=19) is None
    assert low_rank_of(torch.randn(200, 20) @ torch.randn(20, 300), max_rank=20) is not None
    assert low_rank_of(torch.randn(40, 24) @ torch.randn(24, 40)) is None, "factors as large as the difference"
    lora = torch.randn(200, 8) @ torch.randn(8, 300)
    assert low_rank_of(lora.bfloat16()) is None and low_rank_of(lora.bfloat16(), 0.01)[0].shape[1] == 8
    probes = []
    plain = torch.linalg.qr
    monkeypatch.setattr(low_rank.torch.linalg, "qr", lambda x: probes.append(x.shape[1]) or plain(x))
    low_rank_of(torch.randn(1800, 2000))
    assert max(probes) == 32, "full rank is seen at the first probe"


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 3\] holds numbers that are not finite"):
        low_rank_of(torch.tensor([[1.0, torch.nan, 0], [0, 0, 0]]))
