"""Flows whose velocity is known, and the recorder and the fitted sampler run on them as samplers run on a model."""

from types import SimpleNamespace

import torch
from pack import use_comfyui

use_comfyui()

from tessera.methods.sampling import olss
from tessera.patching.olss import Recorder, Student
from tessera.patching.olss_solve import Asked, Runs, Search, relative


class Flow:
    """Called like a model within a sampler: (x [B, n], sigma [B]) -> denoised."""

    def __init__(self, velocity, size: int, dtype=torch.float32):
        self.velocity, self.size, self.dtype = velocity, size, dtype

    def __call__(self, x, sigma, **_):
        return x - sigma[:, None] * self.velocity(x.double(), float(sigma[0])).to(x.dtype)


def mixture(modes: int = 4, size: int = 64, spread: float = 0.3, apart: float = 0.3) -> Flow:
    """x_sigma = (1 - sigma) x_0 + sigma noise, x_0 one of some Gaussians: v = E[noise - x_0 | x]."""
    means = torch.randn(modes, size, generator=torch.Generator().manual_seed(1)).double() * apart

    def velocity(x, sigma):
        keep = 1 - sigma
        variance = keep**2 * spread**2 + sigma**2
        off = x[:, None] - keep * means  # [B, modes, n]
        weight = torch.softmax(-(off**2).sum(-1) / (2 * variance), 1)[..., None]
        clean = (weight * (means + keep * spread**2 / variance * off)).sum(1)
        noise = (weight * sigma / variance * off).sum(1)
        return noise - clean

    return Flow(velocity, size)


def linear_flow(eigenvalues: tuple[float, ...], size: int = 24) -> Flow:
    """v = A x with these eigenvalues."""
    basis = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(2)).double()).Q
    values = torch.tensor(eigenvalues, dtype=torch.float64).repeat(size)[:size]
    matrix = basis @ torch.diag(values) @ basis.T
    return Flow(lambda x, sigma: x @ matrix, size, torch.float64)


def noise(flow: Flow, seeds) -> torch.Tensor:
    found = [torch.randn(flow.size, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(found).to(flow.dtype)


def record(flow: Flow, sigmas: torch.Tensor, seeds, elements: int = 1 << 20):
    """(grams, final states) of Euler's method."""
    recorder = Recorder("euler", elements)
    final = recorder(flow, noise(flow, seeds), sigmas)
    return recorder.grams(), final


def euler(flow: Flow, sigmas: torch.Tensor, seeds) -> torch.Tensor:
    return record(flow, sigmas, seeds)[1]


def student(flow: Flow, table, seeds) -> torch.Tensor:
    return Student(table)(flow, noise(flow, seeds), table.sigmas.to(flow.dtype))


class FlowRuns(Runs):
    """Each seed a job of its own."""

    def __init__(self, flow: Flow, sigmas: torch.Tensor, seeds):
        recorder = Recorder("euler", 1 << 20)
        self.flow, self.seeds, self.learnt = flow, list(seeds), list(range(len(seeds)))
        self.finals = recorder(flow, noise(flow, seeds), sigmas)
        self.grams = recorder.grams()
        states = torch.stack(recorder.states, 1)
        self.trajectory = SimpleNamespace(sigmas=sigmas.tolist(), elements=1 << 20, states=states.split(1))
        self.sampled = 0

    def error(self, number, sampler, sigmas):
        self.sampled += 1
        got = sampler.sampler_function(self.flow, noise(self.flow, [self.seeds[number]]), sigmas.to(self.flow.dtype))
        return relative(got, self.finals[number : number + 1])


def searched(flow: Flow, sigmas: torch.Tensor, seeds, trials: int, path: str = "auto", steps: int = 8) -> Search:
    runs, asked = FlowRuns(flow, sigmas, seeds), Asked(steps, path, 1e-4, "euler", 0.0, False, trials)
    paths = olss.paths_of(path, runs.grams, sigmas.tolist(), steps, 1e-4, "euler")
    return Search(runs, runs.grams, paths, asked)
