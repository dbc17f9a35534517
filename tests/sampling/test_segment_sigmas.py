"""Segment Sigmas: the edges are those of the papers, mapped through the model's own shift."""

import pytest
import torch
from nodes_helper import model_of, run_node

import comfy.samplers  # isort: skip

from tessera.methods.sampling.few_step import numbers, segment_points, shifted, tail
from tessera.nodes.sampling.segment_sigmas import SegmentSigmas


def test_pcm_edges_of_four_segments():
    points = segment_points("pcm_floor", 4, 50, lambda t: t)
    assert [round(50 * (1 - p)) for p in points] == [0, 12, 25, 37, 50]
    with pytest.raises(ValueError, match="segments 12 must be at most grid 10"):
        segment_points("pcm_floor", 12, 10, lambda t: t)


def test_even_edges():
    assert segment_points("uniform_t", 4, 50, lambda t: t) == [1, 0.75, 0.5, 0.25, 0]
    points = segment_points("uniform_sigma", 4, 50, lambda t: shifted(t, 3.0))
    assert [shifted(p, 3.0) for p in points] == pytest.approx([1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize("name", ["flux", "wan_meta", "sd3"])
def test_the_models_own_shift(name):
    model, _ = model_of(name)
    sampling = model.get_model_object("model_sampling")
    sigmas = run_node(SegmentSigmas, model=model, edges="uniform_t", segments=4)[0]
    want = [float(sampling.percent_to_sigma(p)) for p in (0, 0.25, 0.5, 0.75)] + [0.0]
    assert sigmas.tolist() == pytest.approx(want) and sigmas.dtype == torch.float32
    grid = comfy.samplers.calculate_sigmas(sampling, "normal", 8)
    assert sigmas[0] == pytest.approx(float(grid[0]), rel=1e-3)
    own = run_node(SegmentSigmas, model=model, edges="uniform_t", segments=4, shift=5.0)[0]
    assert own.tolist() == pytest.approx([shifted(t, 5.0) for t in (1, 0.75, 0.5, 0.25, 0)])


def test_denoise_starts_at_an_edge_and_says_so():
    model, _ = model_of("wan_meta")
    whole = run_node(SegmentSigmas, model=model)[0]
    part, report = run_node(SegmentSigmas, model=model, denoise=0.6)
    assert torch.equal(part, whole[2:]) and "denoise 0.6 starts at the edge 0.5" in report
    assert len(run_node(SegmentSigmas, model=model, denoise=0.0)[0]) == 0
    assert tail([1, 0.75, 0.5, 0.25, 0], 0.01) == ([0.25, 0], 0.25)


def test_custom_edges():
    model, _ = model_of("flux")
    sigmas = run_node(SegmentSigmas, model=model, edges="custom", custom="1, 0.9, 0.4", shift=1.0)[0]
    assert sigmas.tolist() == pytest.approx([1, 0.9, 0.4, 0])
    assert numbers("1, 0.5, 0", "custom", 1.0) == [1, 0.5]
    for wrong in ("", "0.5, 0.9", "1, x", "1.5, 1", "1, nan", "1, -0.5"):
        with pytest.raises(ValueError, match="custom .* (numbers|falling)"):
            run_node(SegmentSigmas, model=model, edges="custom", custom=wrong)


def test_a_shift_is_for_flows():
    class Discrete:
        def get_model_object(self, name):
            class Sampling:
                sigma_max = torch.tensor(14.6)

                def percent_to_sigma(self, percent):
                    return 999999999.9 if percent <= 0 else 14.6 * (1 - percent)

            return Sampling()

    sigmas = run_node(SegmentSigmas, model=Discrete(), edges="uniform_t", segments=2)[0]
    assert sigmas.tolist() == pytest.approx([14.6, 7.3, 0])
    with pytest.raises(
        ValueError, match="shift 3 is for flow models, and the sigmas of this one go up to 14.6; set shift 0"
    ):
        run_node(SegmentSigmas, model=Discrete(), shift=3.0)
