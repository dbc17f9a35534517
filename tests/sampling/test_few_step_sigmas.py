"""Few-Step Sigmas: presets, own timesteps, and a run on them."""

import pytest
import torch
from few_step_helper import few, sampled
from nodes_helper import error, model_of, run_node

import comfy.samplers  # isort: skip

from tessera.methods.sampling.few_step import PRESETS, shifted
from tessera.nodes.sampling.few_step_sigmas import FewStepSigmas


@pytest.mark.parametrize("preset", [*PRESETS])
def test_presets(preset):
    model, spec = model_of("flux")
    steps, shift = PRESETS[preset]
    sigmas, report = run_node(FewStepSigmas, model=model, preset=preset)
    assert sigmas.tolist() == pytest.approx([*(shifted(t / 1000, shift) for t in steps), 0.0])
    assert sigmas[0] == 1 and (sigmas.diff() < 0).all() and report.startswith(f"{len(steps)} steps: 1.0000")
    assert torch.isfinite(sampled(model, spec, few("renoise"), sigmas=sigmas)).all()


def test_own_timesteps_and_shift():
    model, _ = model_of("wan_meta")
    sampling = model.get_model_object("model_sampling")
    sigmas = run_node(FewStepSigmas, model=model, preset="custom", timesteps="1000, 757, 522")[0]
    assert sigmas.tolist() == pytest.approx([1.0, float(sampling.percent_to_sigma(0.243)), float(sampling.percent_to_sigma(0.478)), 0.0])  # fmt: skip
    own = run_node(FewStepSigmas, model=model, preset="wan_dmd_4", shift=1.0)[0]
    assert own.tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    part, report = run_node(FewStepSigmas, model=model, preset="wan_dmd_4", shift=1.0, denoise=0.7)
    assert part.tolist() == pytest.approx([0.75, 0.5, 0.25, 0]) and "starts at the edge 0.75" in report
    for wrong in ("", "250, 500", "1000, a", "1200"):
        with pytest.raises(ValueError, match="timesteps .* (numbers|falling)"):
            run_node(FewStepSigmas, model=model, preset="custom", timesteps=wrong)


def test_all_steps_of_the_schedule_are_cores_run():
    """On its own timesteps a model without distillation draws what euler draws."""
    model, spec = model_of("flux")
    sigmas = run_node(FewStepSigmas, model=model, preset="custom", timesteps="1000, 800, 600, 400, 200")[0]
    want = sampled(model, spec, comfy.samplers.sampler_object("euler"), sigmas=sigmas)
    assert error(sampled(model, spec, few("ode_jump"), sigmas=sigmas), want) == 0


def test_a_model_that_is_no_flow_is_told_the_way():
    """shift 0 is the preset's own: to set it would not help."""
    model, _ = model_of("pixart")
    with pytest.raises(ValueError, match="take preset custom and shift 0"):
        run_node(FewStepSigmas, model=model, preset="wan_dmd_4")
    with pytest.raises(ValueError, match="157.4.*; set shift 0"):
        run_node(FewStepSigmas, model=model, preset="custom", shift=3.0)
    assert (
        run_node(FewStepSigmas, model=model, preset="custom")[0][0]
        == model.get_model_object("model_sampling").sigma_max
    )
