"""Which tokens Region-Adaptive Sampling computes, and where they lie: no model here."""

import math

import pytest
import torch

from tessera.methods.cache.region import (
    Choice,
    ages,
    latent_mask,
    measure,
    parse_resets,
    region_tokens,
    sparse_steps,
)


def longest_wait(choice: Choice, measured: torch.Tensor, steps: int) -> int:
    """The most steps from one that computes a token to the next that does."""
    left_out = torch.zeros_like(measured)
    worst = 0
    for _ in range(steps):
        active = choice.choose(measured, left_out, None, choice.count(measured.shape[-1]))
        left_out = ages(left_out, active)
        worst = max(worst, int(left_out.max()) + 1)
    return worst


@pytest.mark.parametrize("keep", ["high", "low", "mixed"])
@pytest.mark.parametrize("starvation", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 30.0])
def test_no_token_starves(keep, starvation, spread):
    noise = torch.randn(2, 100, generator=torch.Generator().manual_seed(1))
    assert longest_wait(Choice(keep=keep, starvation=starvation), (noise * spread).exp(), 24) <= 4


@pytest.mark.parametrize("keep", ["high", "low"])
def test_without_starvation_the_same_tokens_are_computed_for_ever(keep):
    measured = torch.arange(1.0, 101.0)[None]
    choice = Choice(keep=keep, starvation=0.0, round_to=1)
    assert longest_wait(choice, measured, 24) == 25
    active = choice.choose(measured, torch.zeros(1, 100), None, 50)[0]
    assert torch.equal(active, torch.arange(50, 100) if keep == "high" else torch.arange(50))


def test_mixed_takes_its_part_from_the_low_end():
    measured = torch.arange(1.0, 101.0)[None]
    active = Choice(keep="mixed", mixed=0.3, starvation=0.0).choose(measured, torch.zeros(1, 100), None, 50)[0]
    assert torch.equal(active, torch.cat((torch.arange(15), torch.arange(65, 100))))


def test_every_sample_has_as_many_and_its_own():
    measured = torch.stack((torch.arange(1.0, 101.0), torch.arange(100.0, 0.0, -1)))
    active = Choice(starvation=0.0).choose(measured, torch.zeros(2, 100), None, 40)
    assert torch.equal(active, torch.stack((torch.arange(60, 100), torch.arange(40))))


def test_always_comes_before_anything_else():
    measured = torch.arange(1.0, 101.0)[None]
    always = torch.zeros(1, 100, dtype=torch.bool)
    always[0, :7] = True
    for keep in ("high", "mixed"):
        active = Choice(keep=keep).choose(measured, torch.full((1, 100), 50.0), always, 10)[0]
        assert set(range(7)) <= set(active.tolist()) and len(set(active.tolist())) == 10


@pytest.mark.parametrize(
    "tokens, ratio, unit, want",
    [(4096, 0.5, 64, 2048), (4096, 0.51, 64, 2112), (240, 0.5, 64, 120), (24, 0.5, 64, 12), (24, 0.05, 64, 2), (7, 0.1, 64, 1)],
)  # fmt: skip
def test_counts(tokens, ratio, unit, want):
    assert Choice(ratio=ratio, round_to=unit).count(tokens) == want


def test_a_ratio_that_moves_keeps_its_mean():
    for schedule in ("linear_up", "linear_down"):
        counts = [Choice(0.5, round_to=1, schedule=schedule).count(1000, s / 10) for s in range(11)]
        assert counts == sorted(counts, reverse=schedule == "linear_down") and (min(counts), max(counts)) == (250, 750)
        assert sum(counts) / 11 == pytest.approx(500, abs=1)


def test_steps():
    def dense(*given):
        return [i for i, sparse in enumerate(sparse_steps(*given)) if not sparse]

    assert dense(28, 4, 8) == [0, 1, 2, 3, 11, 19, 27]
    assert dense(30, 4, 8, frozenset({12, 22})) == [0, 1, 2, 3, 12, 22]
    assert dense(10, 4, 0) == [0, 1, 2, 3]
    assert dense(3, 4, 8) == [0, 1, 2]
    assert parse_resets(" 12, 22 ") == {12, 22} and parse_resets("") is None
    with pytest.raises(ValueError, match="reset_steps holds steps from 0"):
        parse_resets("12;22")


@pytest.mark.parametrize(
    "grid, patch, shape",
    [
        ((1, 6, 10), (1, 2, 2), (2, 4, 12, 20)),
        ((1, 6, 10), (1, 2, 2), (2, 4, 11, 19)),
        ((3, 4, 5), (1, 2, 2), (2, 4, 3, 8, 10)),
        ((2, 2, 3), (2, 3, 1), (2, 4, 3, 5, 3)),
        ((1, 12, 20), (1, 1, 1), (2, 4, 1, 12, 20)),
    ],
)
def test_a_token_is_its_own_pixels(grid, patch, shape):
    """Token n covers exactly its patch, and is measured there and nowhere else."""
    t, h, w = grid
    frames = shape[2] if len(shape) == 5 else 1
    covered = torch.zeros(1, frames, *shape[-2:])
    for n in range(math.prod(grid)):
        at = torch.tensor([[n], [n]])
        mask = latent_mask(at, grid, patch, shape)
        place = (n // (h * w), n // w % h, n % w)
        want = torch.zeros(frames, *shape[-2:], dtype=torch.bool)
        want[tuple(slice(p * s, (p + 1) * s) for p, s in zip(place, patch, strict=True))] = True
        assert torch.equal(mask.reshape(2, *want.shape), want.expand(2, *want.shape))
        v = torch.zeros(shape)
        v[:, 0] = mask[:, 0].float()
        found = measure(v, None, "l2norm", patch)
        assert torch.equal(found, torch.nn.functional.one_hot(at[:, 0], math.prod(grid)).float())
        covered += want
    assert (covered == 1).all()


def test_metrics():
    v, before = torch.randn(2, 6, 4, 8), torch.randn(2, 6, 4, 8)
    patches = lambda x: x.unfold(-2, 2, 2).unfold(-2, 2, 2).mean((-1, -2)).flatten(1)  # noqa: E731
    for metric, each in (
        ("std", (v - v.mean(1, keepdim=True)).square().mean(1).sqrt()),
        ("l2norm", v.square().sum(1).sqrt()),
        ("delta_norm", (v - before).square().sum(1).sqrt()),
    ):
        assert torch.allclose(measure(v, before, metric, (1, 2, 2)), patches(each), atol=1e-6)


def test_region_masks():
    mask = torch.zeros(1, 24, 40)
    mask[0, 5, 39] = 1  # one pixel touches one token of 6 x 10
    assert region_tokens(mask, (1, 6, 10), 2).nonzero().tolist() == [[0, 19], [1, 19]]
    each = torch.cat((mask, mask.flip(1, 2)))
    assert region_tokens(each, (1, 6, 10), 2).nonzero().tolist() == [[0, 19], [1, 40]]
    assert region_tokens(each, (4, 6, 10), 1).nonzero()[:, 1].tolist() == [19, 79, 160, 220]
