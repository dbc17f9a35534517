"""Where blocks begin, and the noise between their steps."""

import pytest
import torch

from tessera.methods.video import blocks as m


@pytest.mark.parametrize(
    ("frames", "per_block", "want"),
    [(43, 10, [0, 13, 23, 33, 43]), (12, 3, [0, 3, 6, 9, 12]), (5, 10, [0, 5]), (10, 10, [0, 10]), (1, 1, [0, 1])],
)
def test_the_first_block_takes_what_is_left_over(frames, per_block, want):
    assert m.split(frames, per_block) == want


def test_a_first_block_may_lead():
    assert m.split(32, 4, 4) == [0, 8, 12, 16, 20, 24, 28, 32]
    assert m.split(43, 10, 20) == [0, 33, 43] and m.split(5, 4, 4) == [0, 5]
    assert m.continued(16, 4, [0, 8], 4) == [0, 8, 12, 16]


def test_a_split_needs_frames():
    with pytest.raises(ValueError, match="at least 1"):
        m.split(0, 3)


def test_a_clip_goes_on_where_its_own_split_has_the_boundary_or_behind_it():
    assert m.continued(43, 10, [0, 13, 23]) == [0, 13, 23, 33, 43]
    assert m.continued(43, 10, [0, 10, 20]) == [0, 10, 20, 33, 43]


def test_what_a_block_looks_back_on():
    assert m.kept([0, 3, 6, 9], 6, 0, 0) == [0, 1, 2, 3, 4, 5]
    assert m.kept([0, 3, 6, 9], 9, 1, 0) == [6, 7, 8]
    assert m.kept([0, 3, 6, 9], 9, 1, 2) == [0, 1, 6, 7, 8]
    assert m.kept([0, 3, 6, 9], 0, 1, 2) == []


def test_fresh_noise_is_that_of_cores_sampler():
    x0 = torch.randn(2, 3, 4, 5, 6)
    torch.manual_seed(7 + 2 * 1000 + 1)
    want = (1 - 0.3) * x0 + 0.3 * torch.randn_like(x0)
    assert torch.equal(m.renoise(x0, 0.3, 7, 2, 1), want)
    assert torch.equal(m.renoise(x0, 0.0, 7, 2, 1), x0)


def test_the_largest_seed_has_noise_too():
    noise = m.noise_like(torch.zeros(1, 2, 3, 4, 5), 2**64 - 1, 2, 1)
    assert torch.equal(noise, m.noise_like(torch.zeros(1, 2, 3, 4, 5), 0, 2, 0))
