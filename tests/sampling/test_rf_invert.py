"""RF Invert: the noise leads back to the source, exactly where it should start, and what cannot be inverted is refused."""

import comfy.model_management
import comfy.samplers
import pytest
import torch
from flow_helper import digits, guider_of, half, run, sample, schedule, word
from nodes_helper import conds, error, model_of, run_node, taylor

from tessera.nodes.sampling.rf_invert import RfInvert
from tessera.nodes.sampling.rf_solver_sampler import RfSolverSampler
from tessera.patching.rf_invert import InvertedNoise


def source(shape=(1, 16, 8, 12)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def inverted(model, spec, sigmas, solver="rf_solver", record_steps=0, latent=None, **rest):
    latent = {"samples": source(spec.latent) if latent is None else latent}
    return run_node(RfInvert, model=model, positive=conds(spec)[0], latent=latent, sigmas=sigmas, solver=solver,
                    record_steps=record_steps, **rest)  # fmt: skip


def sampler(solver="rf_solver", **rest):
    return run_node(RfSolverSampler, solver=solver, **rest)[0]


@pytest.fixture(scope="module")
def seven():
    """A drawn seven: a source that the digit model knows. [1, 16, 16, 16]"""
    return sample(guider_of(digits(), word("seven")), sampler(), schedule(10), torch.zeros(1, 16, 16, 16))


def digit_round_trip(seven, solver, steps):
    out = run_node(RfInvert, model=digits(), positive=word("seven"), latent={"samples": seven}, sigmas=schedule(steps),
                   solver=solver, record_steps=0)  # fmt: skip
    back = sample(guider_of(digits(), word("seven")), sampler(solver), schedule(steps), seven, noise=out[0])
    return error(back, seven)


def test_the_digit_comes_back_far_nearer_than_by_euler_at_equal_evaluations(seven):
    ours, euler = digit_round_trip(seven, "rf_solver", 10), digit_round_trip(seven, "euler", 20)
    assert ours < euler / 5, (ours, euler)
    finer = digit_round_trip(seven, "rf_solver", 20)
    assert finer < ours / 4, (finer, ours)


@pytest.mark.parametrize("start", [1.0, 0.6])
def test_the_run_starts_exactly_at_the_inverted_state(start):
    model, spec = model_of("flux")
    out = inverted(model, spec, schedule(3, start))
    noise, begun = out[0], []

    class First(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, *rest, **more):
            scaling = model_wrap.inner_model.model_sampling.noise_scaling
            begun.append(scaling(sigmas[0], noise, latent_image, self.max_denoise(model_wrap, sigmas)))
            return latent_image

    for latent in (source(spec.latent), torch.zeros(spec.latent)):  # whatever the latent of the run
        run(model, spec, First(), schedule(3, start), latent=latent, noise=noise)
        assert error(begun[-1], noise.x) < 1e-6
    assert error(out[2]["samples"], model.model.process_latent_out(noise.x)) < 1e-6


@pytest.mark.parametrize(
    ("name", "solver"),
    [("flux", "rf_solver"), ("flux", "fireflow"), ("flux", "ralston_3"), ("wan", "rf_solver"), ("sd3", "rf_solver")],
)
def test_round_trips_of_other_solvers_and_families(name, solver):
    """At the end of the flow, where a random model is not chaotic."""
    model, spec = model_of(name)
    errors = []
    for steps in (2, 4):
        noise = inverted(model, spec, schedule(steps, 0.05), solver, start_sigma=1e-4)[0]
        back = run(
            model, spec, sampler(solver), schedule(steps, 0.05), cfg=1.0, latent=source(spec.latent), noise=noise
        )
        errors.append(error(back, source(spec.latent)))
    assert errors[0] < 0.05 and errors[1] < errors[0] * 0.75, errors


def test_euler_first_matches_euler_last():
    model, spec = model_of("flux")
    errors = {}
    for flag in (False, True):
        noise = inverted(model, spec, schedule(3, 0.05), first_step_euler=flag)[0]
        back = run(model, spec, sampler(last_step_euler=flag), schedule(3, 0.05), cfg=1.0, latent=source(), noise=noise)
        errors[flag] = error(back, source())
    assert errors[True] < 0.1 and errors[False] < errors[True]


def test_guidance_needs_its_negative_prompt_and_changes_the_path():
    model, spec = model_of("flux")
    with pytest.raises(ValueError, match="cfg 3 needs a negative prompt"):
        inverted(model, spec, schedule(2), cfg=3.0)
    guided = inverted(model, spec, schedule(2, 0.3), cfg=3.0, negative=conds(spec)[1])[0]
    assert error(guided.x, inverted(model, spec, schedule(2, 0.3))[0].x) > 1e-3


def test_a_batch_and_a_repeated_run():
    model, spec = model_of("flux")
    two = source((2, 16, 8, 12))
    both = inverted(model, spec, schedule(3, 0.4), latent=two)[0]
    each = [inverted(model, spec, schedule(3, 0.4), latent=row[None])[0] for row in two]
    assert error(both.x, torch.cat([n.x for n in each])) < 1e-5
    assert torch.equal(each[0].x, inverted(model, spec, schedule(3, 0.4), latent=two[:1])[0].x)
    several = each[0].generate_noise({"samples": torch.zeros(3, 16, 8, 12)})
    assert several.shape[0] == 3 and torch.equal(several[0], several[2])


def test_bfloat16_is_near_full_precision(seven):
    each = [
        run_node(
            RfInvert, model=m, positive=word("seven"), latent={"samples": seven}, sigmas=schedule(4), record_steps=0
        )
        for m in (half(), digits())
    ]
    assert 0 < error(each[0][0].x, each[1][0].x) < 0.05


def test_a_cache_may_be_on_the_model_while_nothing_is_recorded():
    model, spec = model_of("flux")
    cached = inverted(taylor(model), spec, schedule(8, 0.4))[0]
    assert 0 < error(cached.x, inverted(model, spec, schedule(8, 0.4))[0].x) < 0.2
    with pytest.raises(ValueError, match="before that node"):
        inverted(taylor(model), spec, schedule(8, 0.4), record_steps=6)


def test_an_interrupt_ends_it_and_leaves_nothing_behind(monkeypatch):
    model, spec = model_of("flux")
    want = inverted(model, spec, schedule(3, 0.4))[0].x
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        inverted(model, spec, schedule(3, 0.4), record_steps=2)
    assert torch.equal(inverted(model, spec, schedule(3, 0.4))[0].x, want)


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 0.5], [0.0, 1.0], [1.0, 0.5, 0.5, 0.0]])
def test_schedules_that_do_not_fall_to_zero_are_refused(sigmas):
    model, spec = model_of("flux")
    with pytest.raises(ValueError, match="fall from step to step and end at 0"):
        inverted(model, spec, torch.tensor(sigmas))


def test_models_that_are_no_flow_are_refused():
    model, spec = model_of("flux")
    model.add_object_patch("model_sampling", comfy.samplers.comfy.model_sampling.EPS())
    with pytest.raises(ValueError, match="Use a flow model"):
        inverted(model, spec, schedule(2))


def test_other_latents_are_refused():
    noise = InvertedNoise(torch.zeros(2, 4, 8, 8), 1.0, 1.0, None)
    with pytest.raises(ValueError, match=r"for a latent \[2, 4, 8, 8\], and this run has \[1, 4, 8, 9\]"):
        noise.generate_noise({"samples": torch.zeros(1, 4, 8, 9)})
    with pytest.raises(ValueError, match="for 2 latents, and this run has 3"):
        noise.generate_noise({"samples": torch.zeros(3, 4, 8, 8)})


def test_more_steps_than_there_are_are_refused():
    model, spec = model_of("flux")
    with pytest.raises(ValueError, match="record_steps 4 are more than the 2 steps"):
        inverted(model, spec, schedule(2), record_steps=4)


def test_the_mask_of_the_latent_is_not_used():
    """LTX would take the frames outside of it for clean ones."""
    model, spec = model_of("ltxv_meta")
    mask = torch.ones(1, 1, *spec.latent[2:])
    mask[:, :, 0] = 0
    plain, masked = (
        run_node(
            RfInvert, model=model, positive=conds(spec)[0], latent={"samples": source(spec.latent), **given},
            sigmas=schedule(2, 0.6), record_steps=0,
        )
        for given in ({}, {"noise_mask": mask})
    )  # fmt: skip
    assert torch.equal(masked[0].x, plain[0].x) and "noise_mask" not in masked[2]
