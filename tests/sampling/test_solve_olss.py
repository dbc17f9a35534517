"""Solve OLSS: its identities on analytic flows, the bars, and the node from recorded runs to a sampled latent."""

import math
import random

import pytest
import torch
from nodes_helper import Job, error, model_of, run_node, taylor
from olss_helper import Flow, euler, linear_flow, mixture, record, searched, student
from tiny_models import empty_latent

import comfy.model_management  # isort: skip
import comfy.samplers  # isort: skip
import folder_paths  # isort: skip

from tessera.methods.sampling import olss as m
from tessera.methods.sampling.olss_files import load
from tessera.nodes.sampling.load_olss import LoadOlss
from tessera.nodes.sampling.record_trajectory import RecordTrajectory
from tessera.nodes.sampling.solve_olss import SolveOlss

SIGMAS = torch.linspace(1, 0, 101)


def solved(flow: Flow, steps, kind="uniform", ridge=1e-4, prior="euler", seeds=range(9)):
    grams, _ = record(flow, SIGMAS, seeds)
    path = m.paths_of(kind, grams, SIGMAS.tolist(), steps, ridge, prior)[-1]
    return m.solve(grams, SIGMAS.tolist(), path, ridge, prior), path, grams


def test_a_tenth_of_eulers_error_on_an_analytic_flow():
    flow = mixture()
    table, _, _ = solved(flow, 8)
    _, want = record(flow, SIGMAS, range(100, 164))
    plain = torch.linspace(1, 0, 9)
    off = error(student(flow, table, range(100, 164)), want)
    assert off <= 0.1 * error(euler(flow, plain, range(100, 164)), want) and table.largest < 30


def test_a_tenth_of_eulers_error_by_search():
    """Also where the modes are far apart, and a fit to the recording alone has two thirds of Euler's error: some of the
    fresh samples end in another mode."""
    for apart, runs, trials in ((0.3, 6, 10), (1.0, 24, 10)):
        flow = mixture(apart=apart)
        _, want = record(flow, SIGMAS, range(100, 164))
        plain = error(euler(flow, torch.linspace(1, 0, 9), range(100, 164)), want)
        found = searched(flow, SIGMAS, range(runs), trials)
        assert error(student(flow, found.table, range(100, 164)), want) <= 0.1 * plain
        assert found.made <= trials and found.table.largest < 30
    even, _, _ = solved(flow, 8, seeds=range(24))
    assert error(student(flow, even, range(100, 164)), want) > 0.5 * plain


def test_what_a_trial_says_is_so():
    """The error told is that of the table given out on the seeds learnt from; more trials are no worse, and no pass is
    made that cannot win."""
    flow, seeds = mixture(apart=0.6), range(6)
    _, want = record(flow, SIGMAS, seeds)
    told = []
    for trials in (1, 2, 10, 14):
        found = searched(flow, SIGMAS, seeds, trials)
        got = student(flow, found.table, seeds)
        mean = ((got - want).norm(dim=1) / want.norm(dim=1)).mean().item()
        assert found.error == pytest.approx(mean, rel=1e-3) and found.made <= trials
        assert found.runs.sampled <= found.made * 6
        told.append(found.error)
    assert told == sorted(told, reverse=True) and told[-1] < 0.5 * told[0]
    assert found.runs.sampled < found.made * 6
    none = searched(flow, SIGMAS, seeds, 0)
    assert none.runs.sampled == 0 and none.points == m.between(*(m.paths_of("auto", none.grams, SIGMAS.tolist(), 8, 1e-4, "euler")[i] for i in (1, 2)), 0.5)  # fmt: skip
    fixed = searched(flow, SIGMAS, seeds, 24, "uniform")
    assert fixed.points == m.uniform_path(100, 8) and fixed.made <= 5


def test_a_run_that_left_its_teacher_counts_less():
    off = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 99.0]], dtype=torch.float64)
    weights = m.trust(off, 1.0)
    assert torch.allclose(weights[:, 0], torch.ones(3, dtype=torch.float64))
    assert weights[0, 1] == weights[1, 1] == pytest.approx(50 * float(weights[2, 1]), rel=1e-6)
    assert torch.allclose(weights.mean(0), torch.ones(2, dtype=torch.float64))


def test_moved_paths_still_rise():
    chance = random.Random(0)
    path = m.uniform_path(20, 6)
    for _ in range(200):
        after = m.moved(path, chance)
        assert sum(a != b for a, b in zip(path, after, strict=True)) == 1 and after == sorted(set(after))
        assert (after[0], after[-1]) == (0, 20)
        path = after
    assert m.moved([0, 1, 2, 3], chance) is None and m.moved([0, 5], chance) is None


def test_the_teachers_own_steps_are_the_teacher():
    flow = mixture()
    for ridge in (1e-8, 1e-4):
        table, path, _ = solved(flow, 100, "uniform", ridge)
        assert path == list(range(101))
        _, want = record(flow, SIGMAS, range(50, 54))
        assert error(student(flow, table, range(50, 54)), want) < 1e-5
    one = torch.tensor([1.0, 0.0])
    grams, want = record(flow, one, range(3))
    table = m.solve(grams, one.tolist(), [0, 1], 1e-4, "euler")
    assert error(student(flow, table, range(3)), want) < 1e-6


def test_a_linear_flow_with_few_eigenvalues_is_learnt():
    """x' = A x: its end is in the span of as many states as A has eigenvalues, for any start."""
    flow = linear_flow((0.2, -0.5, 0.9))
    table, path, _ = solved(flow, 6, ridge=0.0, seeds=range(4))
    fresh, want = record(flow, SIGMAS, range(30, 40))
    assert m.fit_error(fresh, table, path) < 1e-6
    plain = error(euler(flow, table.sigmas, range(30, 40)), want)
    assert error(student(flow, table, range(30, 40)), want) < 0.1 * plain


def test_one_more_column_never_fits_worse():
    flow = mixture()
    _, _, grams = solved(flow, 4)
    errors = [m.fit_row(grams, SIGMAS.tolist(), path, len(path) - 2, 0.0, "euler")[1]
              for path in ([0, 100], [0, 50, 100], [0, 25, 50, 100], [0, 25, 50, 75, 100])]  # fmt: skip
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("steps", [1, 3, 8, 17, 100])
def test_the_paths_rise_from_the_first_to_the_last_point(steps):
    flow = mixture()
    grams, _ = record(flow, SIGMAS, range(3))
    for kind in m.PATHS:
        for path in m.paths_of(kind, grams, SIGMAS.tolist(), steps, 1e-4, "euler"):
            assert len(path) == steps + 1 and path[0] == 0 and path[-1] == 100
            assert all(a < b for a, b in zip(path, path[1:], strict=False))


def test_much_ridge_is_the_prior():
    flow = mixture()
    table, path, grams = solved(flow, 8, "uniform", ridge=1e12)
    steps = table.sigmas.diff()
    assert torch.allclose(table.a, torch.ones(8, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(table.b, steps.repeat(8, 1).tril(), atol=1e-9)
    got = student(flow, table, range(4))
    assert error(got, euler(flow, table.sigmas.float(), range(4))) < 1e-6
    second = m.solve(grams, SIGMAS.tolist(), path, 1e12, "ab2")
    more = steps[1] ** 2 / (2 * steps[0])
    assert torch.allclose(second.b[1, :2], torch.stack([steps[0] - more, steps[1] + more]), atol=1e-9)
    assert m.solve(grams, SIGMAS.tolist(), path, 1e12, "zero").largest < 1e-6


def test_some_places_tell_as_much_as_all():
    flow = mixture(size=4096)
    whole, _ = record(flow, SIGMAS, range(6))
    part, _ = record(flow, SIGMAS, range(6), elements=2048)
    tables = [m.solve(g, SIGMAS.tolist(), m.uniform_path(100, 6), 1e-2, "euler") for g in (whole, part)]
    a, b = (torch.cat([t.a, t.b.flatten()]) for t in tables)
    assert 0 < float((a - b).abs().max()) < 0.05


def test_a_gram_is_of_states_and_velocities():
    states, velocities = torch.randn(4, 7), torch.randn(3, 7)
    got = m.gram(states, velocities)
    assert got.shape == (7, 7) and got.dtype == torch.float64
    assert float(got[1, 5]) == pytest.approx(float((states[1] * velocities[1]).mean()), rel=1e-5)


def test_too_many_steps_are_refused():
    with pytest.raises(ValueError, match="steps 12 must be at most the 10 steps of the recorded runs"):
        m.paths_of("graph", torch.zeros(1, 21, 21), torch.linspace(1, 0, 11).tolist(), 12, 1e-4, "euler")


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    return tmp_path


def recorded(model, spec, runs=3, steps=12, batch=1, **options):
    from calibration_helper import job_of

    given = job_of(model, spec, steps=steps, batch=batch)
    given.pop("sampler")
    return run_node(RecordTrajectory, model=model, runs=runs, **given, **options)


def sampled(model, spec, sampler, sigmas, **options):
    """As SamplerCustom would, with the cfg 3 of the recorded runs."""
    from nodes_helper import conds

    positive, negative = conds(spec)
    latent = options.pop("latent", empty_latent(spec))
    noise = comfy.sample.prepare_noise(latent, options.pop("seed", 21))
    return comfy.sample.sample_custom(
        model, noise, 3.0, sampler, sigmas, positive, negative, latent, disable_pbar=True, seed=21,
        noise_mask=options.pop("mask", None), callback=options.pop("callback", None),
    )  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), [("flux", "fp32"), ("wan_meta", "bf16")])
def test_the_node_fits_checks_saves_and_loads(output, name, dtype):
    model, spec = model_of(name, dtype)
    trajectory, told = recorded(model, spec)
    assert "teacher: euler 12" in told and "cfg: 3" in told
    out = run_node(SolveOlss, trajectory=trajectory, steps=4, name="mine", holdout=0.4, path="auto", trials=3)
    sampler, sigmas, report = out
    errors = {
        row.split(",")[0].strip(): float(row.rsplit(" ", 1)[1]) for row in report.split("\n") if "4 steps: " in row
    }
    assert (
        "after 3 trials: 0." in report
        and set(errors) == {"OLSS", "euler", "dpmpp_2m"}
        and "saved as tessera_olss/mine.safetensors" in report
    )
    assert out.ui["tessera_report"][0]["lines"] == report.split("\n")
    want = Job(spec, seed=8, sigmas=trajectory.jobs[0].sigmas, noise=trajectory.jobs[2].noise.generate_noise({"samples": empty_latent(spec)}))(model)  # fmt: skip
    assert error(trajectory.finals[2], want.flatten(1)) < 1e-5  # what was recorded is core's own Euler
    loaded, its, about = run_node(LoadOlss, file="mine.safetensors")
    assert torch.equal(its, sigmas) and "cfg 3" in about and "OLSS of 4 steps" in about
    once = sampled(model, spec, sampler, sigmas)
    assert torch.equal(once, sampled(model, spec, loaded, its)) and torch.equal(
        once, sampled(model, spec, sampler, sigmas)
    )
    assert torch.isfinite(once).all()


def test_without_a_check_the_fit_alone_is_judged():
    model, spec = model_of("flux")
    trajectory, _ = recorded(model, spec, teacher="heun")
    report = run_node(SolveOlss, trajectory=trajectory, steps=4, check=False, trials=0)[2]
    assert "with the teacher's velocities: error 0." in report
    assert "held-out" not in run_node(SolveOlss, trajectory=trajectory, steps=4, holdout=0.0, trials=0)[2]


def test_only_its_own_sigmas_are_taken():
    model, spec = model_of("flux")
    trajectory, _ = recorded(model, spec, runs=1)
    sampler, sigmas, _ = run_node(SolveOlss, trajectory=trajectory, steps=4, check=False, trials=0)
    for wrong in (sigmas[1:], sigmas * 0.9, torch.linspace(1, 0, 7)):
        with pytest.raises(
            ValueError, match="was fitted to 4 steps at the sigmas .* connect the sigmas of the same node"
        ):
            sampled(model, spec, sampler, wrong)


def test_batch_cache_interrupt_and_mask():
    model, spec = model_of("flux")
    trajectory, _ = recorded(model, spec, runs=2)
    sampler, sigmas, _ = run_node(SolveOlss, trajectory=trajectory, steps=6, check=False, trials=0)
    latent = empty_latent(spec)
    plain = sampled(model, spec, sampler, sigmas)
    two = sampled(model, spec, sampler, sigmas, latent=torch.cat([latent] * 2))
    assert error(two[:1], plain) < 1e-4
    cached = taylor(model, interval=2)
    first = sampled(cached, spec, sampler, sigmas)
    assert torch.equal(first, sampled(cached, spec, sampler, sigmas)) and 0 < error(first, plain) < 0.5
    assert torch.equal(sampled(taylor(model, interval=1), spec, sampler, sigmas), plain)

    def stop(step, *rest):
        if step == 2:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sampled(cached, spec, sampler, sigmas, callback=stop)
    assert torch.equal(sampled(cached, spec, sampler, sigmas), first)
    mask = torch.ones(1, 1, *latent.shape[-2:])
    mask[..., :4] = 0
    given = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
    kept = sampled(model, spec, sampler, sigmas, latent=given, mask=mask)
    assert error(kept[..., :4], given[..., :4]) < 1e-5 < error(kept[..., 4:], given[..., 4:])


def test_a_damaged_file_is_refused(output):
    from tessera.methods.files.safetensors_write import SafetensorsWriter

    folder = output / "tessera_olss"
    folder.mkdir()
    good = {"sigmas": torch.tensor([1.0, 0.5, 0.0]), "a": torch.ones(2), "b": torch.ones(2, 2).tril()}
    wrong = {
        "is no table of Solve OLSS": {"a": good["a"]},
        "are not of one number of steps": {**good, "a": torch.ones(3)},
        "its sigmas must fall": {**good, "sigmas": torch.tensor([0.0, 0.5, 1.0])},
        "is not finite": {**good, "a": torch.tensor([math.nan, 1.0])},
    }
    for i, (sentence, tensors) in enumerate(wrong.items()):
        with SafetensorsWriter(folder / f"{i}.safetensors", {"tessera_olss": "1"}, 3) as out:
            for key, tensor in tensors.items():
                out.add(key, tensor)
        with pytest.raises(ValueError, match=sentence):
            load(folder / f"{i}.safetensors")
    with pytest.raises(ValueError, match="There is no sampler 'other.safetensors'"):
        run_node(LoadOlss, file="other.safetensors")
    with pytest.raises(ValueError, match="The name '../x'"):
        run_node(SolveOlss, trajectory=None, name="../x")
