"""RF-Solver Sampler through core's guider: its rule, its evaluations, and what stands beside it."""

import comfy.model_management
import comfy.samplers
import pytest
import torch
from flow_helper import Keep, digits, guider_of, half, run, sample, schedule, word
from nodes_helper import error, facts, kinds, model_of, run_node, taylor

from tessera.methods.sampling.flow import SOLVERS, evaluations
from tessera.nodes.sampling.rf_solver_sampler import RfSolverSampler
from tessera.patching.sampling import metered


def sampler(solver="rf_solver", **rest):
    return run_node(RfSolverSampler, solver=solver, **rest)[0]


def counting(model):
    """(a clone that notes the sigma of every evaluation, the list)."""
    seen, model = [], model.clone()

    def note(apply, given):
        seen.append(float(given["timestep"].max()))
        return apply(given["input"], given["timestep"], **given["c"])

    model.set_model_unet_function_wrapper(note)
    return model, seen


def test_the_midpoint_rule_by_hand():
    model, spec = model_of("flux")
    keep, sigmas = Keep(), schedule(3)
    watched, seen = counting(model)
    got = run(watched, spec, sampler(), sigmas, callback=keep)
    assert [round(s, 4) for s in seen] == [1.0, 0.8333, 0.6667, 0.5, 0.3333, 0.1667]
    for i in range(3):  # a step is told as what it takes: x + h (x - clean) / sigma
        end = keep.x[i + 1] if i < 2 else got
        slope = (keep.x[i] - keep.clean[i]) / sigmas[i]
        assert (
            error(
                keep.x[i] + (sigmas[i + 1] - sigmas[i]) * slope, model.model.process_latent_in(end) if i == 2 else end
            )
            < 1e-5
        )


def test_euler_is_cores_own():
    model, spec = model_of("flux")
    sigmas = schedule(5)
    core = run(model, spec, comfy.samplers.sampler_object("euler"), sigmas)
    assert error(run(model, spec, sampler("euler"), sigmas), core) < 1e-5


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("last_step_euler", [False, True])
def test_evaluations_and_rerun(solver, last_step_euler):
    model, spec = model_of("flux")
    watched, seen = counting(model)
    one = run(watched, spec, sampler(solver, last_step_euler=last_step_euler), schedule(4))
    assert len(seen) == evaluations(solver, 4, last_step_euler)
    assert torch.equal(one, run(model, spec, sampler(solver, last_step_euler=last_step_euler), schedule(4)))


def test_it_comes_nearer_to_the_digit_than_euler_at_equal_evaluations():
    guider, empty = guider_of(digits(), word("seven")), torch.zeros(1, 16, 16, 16)
    exact = sample(guider, sampler("ralston_3"), schedule(24), empty)
    middle = error(sample(guider, sampler(), schedule(16), empty), exact)
    euler = error(sample(guider, sampler("euler"), schedule(32), empty), exact)
    assert middle < euler / 2, (middle, euler)


@pytest.mark.parametrize("name", ["wan", "sd3"])
def test_other_families(name):
    model, spec = model_of(name)
    out = run(model, spec, sampler(), schedule(2))
    assert out.isfinite().all() and error(out, run(model, spec, sampler("euler"), schedule(2))) > 1e-3


def test_rows_of_a_batch_do_not_know_of_each_other():
    model, spec = model_of("flux")
    latent = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(3))
    both = run(model, spec, sampler(), schedule(3, 0.7), latent=latent, noise=Given(latent))
    each = [run(model, spec, sampler(), schedule(3, 0.7), latent=row[None], noise=Given(row[None])) for row in latent]
    assert error(both, torch.cat(each)) < 1e-5


class Given:
    seed = 3

    def __init__(self, like):
        self.noise = like.flip(-1)

    def generate_noise(self, latent):
        return self.noise


@pytest.mark.parametrize("solver", ["rf_solver", "fireflow"])
def test_masked_places_arrive_at_their_latent(solver):
    model, spec = model_of("flux")
    latent = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 1, 8, 12)
    mask[..., :5] = 1
    out = run(model, spec, sampler(solver), schedule(4), latent=latent, mask=mask)
    assert error(out[..., 5:], latent[..., 5:]) < 1e-5 and error(out[..., :5], latent[..., :5]) > 0.1


def test_bfloat16_is_near_full_precision():
    empty = torch.zeros(1, 16, 16, 16)
    each = [sample(guider_of(m, word("two")), sampler(), schedule(4), empty) for m in (half(), digits())]
    assert 0 < error(*each) < 0.05


def test_taylor_cache_counts_its_evaluations_and_steps():
    model, spec = model_of("flux")
    cached = taylor(model, interval=2, warmup=2, tail_full=1)
    out = run(cached, spec, sampler(), schedule(6))
    assert error(out, run(model, spec, sampler(), schedule(6))) < 0.3
    decisions = facts(cached)["decisions"]
    assert [d["step"] for d in decisions] == [i // 2 for i in range(12)] and "p" in kinds(cached)
    assert torch.equal(out, run(cached, spec, sampler(), schedule(6)))


def test_an_interrupt_leaves_nothing_behind():
    model, spec = model_of("flux")
    cached, raised = taylor(model), comfy.model_management.InterruptProcessingException

    def stop(step, *rest):
        if step == 2:
            raise raised

    want = run(cached, spec, sampler(), schedule(6))
    with pytest.raises(raised):
        run(cached, spec, sampler(), schedule(6), callback=stop)
    assert torch.equal(run(cached, spec, sampler(), schedule(6)), want)


def test_a_metered_run_is_the_plain_one():
    model, spec = model_of("flux")
    assert torch.equal(run(metered(model), spec, sampler(), schedule(3)), run(model, spec, sampler(), schedule(3)))
