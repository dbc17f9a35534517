"""Record Trajectory: what it keeps is what the sampler did, from seeds in order, and nothing outlives an interrupt."""

import pytest
import torch
from calibration_helper import job_of
from nodes_helper import Job, error, model_of, run_node
from tiny_models import conds, empty_latent

import comfy.model_management  # isort: skip

from tessera.nodes.sampling.record_trajectory import RecordTrajectory
from tessera.nodes.sampling.solve_olss import SolveOlss
from tessera.patching import olss as m


def recorded(model, spec, steps=5, batch=1, **options):
    given = {**job_of(model, spec, steps=steps, batch=batch), **options}
    given.pop("sampler")
    return run_node(RecordTrajectory, model=model, **given)


@pytest.mark.parametrize("teacher", ["euler", "heun"])
def test_the_runs_are_cores_own(teacher):
    model, spec = model_of("wan_meta")
    trajectory, report = recorded(model, spec, runs=2, teacher=teacher, batch=2)
    assert f"teacher: {teacher} 5" in report and "runs: 2" in report
    assert trajectory.grams.shape == (4, 11, 11) and len(trajectory.finals) == 2
    for number, final in enumerate(trajectory.finals):
        noise = trajectory.jobs[number].noise
        assert noise.seed == 7 + number
        latent = torch.cat([empty_latent(spec)] * 2)
        job = Job(spec, sampler=teacher, sigmas=trajectory.jobs[0].sigmas, noise=noise.generate_noise({"samples": latent}), latent=latent)  # fmt: skip
        want = job(model).flatten(1)
        assert error(final, want) < 1e-5
        inside = model.model.process_latent_in(want.view(2, *latent.shape[1:])).double()
        ends = trajectory.grams[
            2 * number : 2 * number + 2, 5, 5
        ]  # mean square of the last states, as the model sees them
        assert ends.tolist() == pytest.approx(inside.flatten(1).pow(2).mean(1).tolist(), rel=1e-4)
    again, _ = recorded(model, spec, runs=2, teacher=teacher, batch=2)
    assert torch.equal(again.grams, trajectory.grams)


def test_few_elements_are_the_same_places_of_every_state():
    recorder = m.Recorder("euler", 100)
    x = torch.randn(2, 3, 10, 10)
    first, second = recorder.thin(x), recorder.thin(2 * x)
    assert first.shape == (2, 100) and torch.equal(2 * first, second)
    assert all(bool((x[0] == v).any()) for v in first[0])
    assert m.Recorder("euler", 1000).thin(x).shape == (2, 300)


def test_an_interrupt_and_a_schedule_that_cannot_be_learnt(monkeypatch):
    model, spec = model_of("flux")
    want = recorded(model, spec, runs=1)[0].grams
    calls = []

    def stop():
        calls.append(1)
        if len(calls) == 3:
            raise comfy.model_management.InterruptProcessingException

    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", stop)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            recorded(model, spec, runs=1)
    assert torch.equal(recorded(model, spec, runs=1)[0].grams, want)
    for sigmas in (torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.5, 0.7, 0.0])):
        with pytest.raises(ValueError, match="needs at least 3 falling sigmas"):
            recorded(model, spec, sigmas=sigmas)


def test_seeds_that_change_nothing_and_the_last_seed():
    model, spec = model_of("flux")

    class Fixed:
        seed = 2**64 - 1

        def generate_noise(self, latent):
            return torch.ones_like(latent["samples"])

    class Last(Fixed):
        def generate_noise(self, latent):
            return torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(self.seed))

    with pytest.raises(ValueError, match="runs of seeds 18446744073709551615 and 0 are one; take a noise"):
        recorded(model, spec, runs=2, noise=Fixed())
    assert len(recorded(model, spec, runs=1, noise=Fixed())[0].jobs) == 1
    trajectory, _ = recorded(model, spec, runs=2, noise=Last())
    assert [job.noise.seed for job in trajectory.jobs] == [2**64 - 1, 0]


def test_video_with_sound():
    model, spec = model_of("ltxav_meta")
    given = {**job_of(model, model_of("flux")[1], steps=4), "latent": {"samples": empty_latent(spec)}}
    positive, negative = conds(spec)
    given |= {"positive": positive, "negative": negative}
    given.pop("sampler")
    trajectory, _ = run_node(RecordTrajectory, model=model, runs=2, **given)
    size = sum(part.numel() for part in empty_latent(spec).unbind())
    assert trajectory.states[0].shape == (1, 5, size) and trajectory.finals[0].shape == (1, size)
    report = run_node(SolveOlss, trajectory=trajectory, steps=2, trials=3)[2]
    assert "after 3 trials: 0." in report and "OLSS, 2 steps: 0." in report
