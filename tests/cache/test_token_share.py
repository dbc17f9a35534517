"""Which tokens skip an MLP: counts exact, order stable, the least ones and no others."""

import pytest
import torch

from tessera.methods.cache.tokens import Share, contribution, parted


@pytest.mark.parametrize(
    "quantile, min_active, tokens, skipped",
    [(0.3, 0.1, 10, 3), (0.3, 0.1, 7, 2), (0.9, 0.5, 10, 5), (0.9, 0.1, 3, 2), (0.5, 1.0, 8, 0), (0.0, 0.1, 8, 0),
     (0.9, 0.1, 1, 0), (0.7, 0.0, 10, 7), (0.9, 0.1, 0, 0)],
)  # fmt: skip
def test_counts_are_exact(quantile, min_active, tokens, skipped):
    assert Share(quantile, min_active).skipped(tokens) == skipped


def test_the_least_skip_and_order_stays():
    scores = torch.tensor([[5.0, 1.0, 4.0, 1.0, 0.5, 9.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    active, rest = parted(scores, 2, slice(0, 6))
    assert rest.tolist() == [[1, 4], [0, 1]] and active.tolist() == [[0, 2, 3, 5], [2, 3, 4, 5]]


def test_only_those_of_the_slice_skip():
    scores = torch.tensor([[0.0, 0.0, 3.0, 2.0, 1.0, 0.0]])
    active, rest = parted(scores, 2, slice(2, 5))
    assert rest.tolist() == [[3, 4]] and active.tolist() == [[0, 1, 2, 5]]


def test_what_is_not_a_number_is_computed():
    active, rest = parted(torch.tensor([[float("nan"), 1.0, 2.0]]), 2, slice(0, 3))
    assert rest.tolist() == [[1, 2]] and active.tolist() == [[0]]


def test_rows_are_parted_alone_and_fully():
    scores = torch.rand(3, 41)
    active, rest = parted(scores, 13, slice(0, 41))
    for b in range(3):
        assert sorted([*active[b].tolist(), *rest[b].tolist()]) == list(range(41))
        assert scores[b, rest[b]].max() <= scores[b, active[b]].min()


def test_contribution_is_relative():
    stream = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [0.6, 0.8]]])
    made = torch.tensor([[[0.0, 10.0], [0.0, 0.0], [1.0, 0.0]]])
    assert torch.allclose(contribution(made, stream), torch.tensor([[2.0, 0.0, 1.0]]))
    assert contribution(made.bfloat16()[:, :, None], stream.bfloat16()[:, :, None]).dtype == torch.float32
