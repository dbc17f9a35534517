"""Metrics of Control Relevance: nothing for equals, all for what has nothing in common, and edges within a pixel."""

import pytest
import torch

from tessera.methods.measure.control_change import METRICS, change, chart, gradients


def square(at, side=64, size=24):
    picture = torch.zeros(1, side, side)
    picture[:, at : at + size, at : at + size] = 1
    return picture


@pytest.mark.parametrize("metric", METRICS)
def test_equal_is_zero(metric):
    x = torch.randn(2, 24, 20)
    assert change(metric, x, x.clone()) == 0.0
    assert change(metric, torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)) == 0.0
    assert change(metric, x, torch.randn(2, 24, 20)) > 0.1


def test_known_values():
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert change("latent_l2", a, torch.zeros(2, 2)) == pytest.approx(1.0)
    assert change("latent_l2", a, 1.5 * a) == pytest.approx(0.5)
    assert change("cosine", a, 7 * a) == pytest.approx(0.0, abs=1e-6)
    assert change("cosine", a, -a) == pytest.approx(2.0)
    assert change("cosine", a, torch.tensor([[4.0, -3.0], [1.0, 0.0]])) == pytest.approx(0.5), "the mean over the batch"


def test_edges_are_found_within_a_pixel():
    base = square(16)
    assert gradients(base)[0, 30, 30] == 0 and gradients(base)[0, 16, 30] > 0
    assert change("edge_f1", base, square(17)) < 0.05
    assert change("edge_f1", base, square(17)) < change("edge_f1", base, square(22)) <= 1
    assert change("edge_f1", base, torch.zeros(1, 64, 64)) == 1.0
    assert change("edge_f1", base, square(16) * 3) == 0.0, "steeper, at the same places"


def test_chart_has_a_row_for_each_and_takes_zeros():
    picture = chart(["title"], ["input 0", "input 1"], [[0.5, 0.7], [0.0, 0.0]], [1, 2])
    more = chart(["title"], ["a", "b", "c"], [[0.0], [0.0], [0.0]], [1, 2, 3])
    assert picture.ndim == 4 and picture.shape[-1] == 3 and picture.min() >= 0 and picture.max() <= 1
    assert more.shape[1] > picture.shape[1] and torch.isfinite(more).all()
