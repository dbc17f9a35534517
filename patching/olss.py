"""Record Trajectory, and the sampler that Solve OLSS fits to what it recorded."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from comfy_api.latest import io

from ..methods.sampling import olss
from .sampling import Job, Progress, metered, sample
from .sizes import fingerprint
from .solve_threshold import seeded

TrajectorySocket = io.Custom("TESSERA_TRAJECTORY")
TEACHERS = {"euler": 1, "heun": 2}  # evaluations a step


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Recorded runs, and what is needed to sample their jobs again."""

    model: Any
    jobs: list[Job]  # one a seed
    finals: list[torch.Tensor]  # of each job [B, n], fp32 on the CPU
    states: list[torch.Tensor]  # of each job [B, N + 1, n], thinned
    grams: torch.Tensor  # olss.Grams of all pictures, in the jobs' order
    teacher: str
    elements: int
    about: dict[str, str]

    @property
    def sigmas(self) -> list[float]:
        return [float(s) for s in self.jobs[0].sigmas]


class Recorder:
    """A teacher, and the thinned states and velocities of its newest run. Euler's method, or Heun's."""

    def __init__(self, teacher: str, elements: int):
        self.second, self.elements = TEACHERS[teacher] == 2, elements
        self.states: list[torch.Tensor] = []  # [B, n] each
        self.velocities: list[torch.Tensor] = []
        self.index: torch.Tensor | None = None

    def __call__(self, model, x, sigmas, extra_args=None, callback=None, disable=None):
        extra_args = extra_args or {}
        self.states, self.velocities = [], []
        ones = x.new_ones([x.shape[0]])
        for i in range(len(sigmas) - 1):
            denoised = model(x, sigmas[i] * ones, **extra_args)
            velocity = (x - denoised) / sigmas[i]
            self.states.append(self.thin(x))
            self.velocities.append(self.thin(velocity))
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
            far = x + velocity * (sigmas[i + 1] - sigmas[i])
            if self.second and sigmas[i + 1] > 0:
                there = (far - model(far, sigmas[i + 1] * ones, **extra_args)) / sigmas[i + 1]
                far = x + (velocity + there) / 2 * (sigmas[i + 1] - sigmas[i])
            x = far
        self.states.append(self.thin(x))
        return x

    def thin(self, x: torch.Tensor) -> torch.Tensor:
        """[B, ...] -> [B, n]: the same random places of every state."""
        flat = x.detach().reshape(x.shape[0], -1)
        if flat.shape[1] > self.elements:
            if self.index is None or self.index.max() >= flat.shape[1]:
                chosen = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(0))
                self.index = chosen[: self.elements].sort().values
            flat = flat[:, self.index.to(flat.device)]
        return (flat if flat.dtype == torch.float64 else flat.float()).cpu()

    def grams(self) -> torch.Tensor:
        """Of the newest run [B, 2 N + 1, 2 N + 1]."""
        states, velocities = torch.stack(self.states, 1), torch.stack(self.velocities, 1)
        return torch.stack([olss.gram(s, v) for s, v in zip(states, velocities, strict=True)])


def record(model: Any, job: Job, runs: int, teacher: str, elements: int) -> Trajectory:
    """Samples the job from `runs` seeds. ValueError where the schedule cannot be learnt from."""
    sigmas = [float(s) for s in job.sigmas]
    if len(sigmas) < 3 or any(b >= a for a, b in zip(sigmas, sigmas[1:], strict=False)) or sigmas[-2] <= 0:
        raise ValueError(
            f"Record Trajectory needs at least 3 falling sigmas, got {len(sigmas)}; take those of BasicScheduler with 50 steps."
        )
    progress = Progress((len(sigmas) - 1) * runs)
    plain = metered(model)
    recorder = Recorder(teacher, elements)
    jobs, finals, states, grams = [], [], [], []
    for number in range(runs):
        one = seeded(dataclasses.replace(job, sampler=comfy.samplers.KSAMPLER(recorder)), number)
        finals.append(flat(sample(plain, one, progress.step).samples))
        if not torch.isfinite(finals[-1]).all():
            raise ValueError(f"The run of seed {one.noise.seed} is not finite; sample it with KSampler to see why.")
        if number and torch.equal(finals[-1], finals[0]):
            raise ValueError(
                f"The runs of seeds {jobs[0].noise.seed} and {one.noise.seed} are one; take a noise that its seed changes, as RandomNoise, or runs 1."
            )
        jobs.append(one)
        states.append(torch.stack(recorder.states, 1))
        grams.append(recorder.grams())
    about = {
        "model": fingerprint(model), "cfg": f"{job.cfg:g}", "teacher": f"{teacher} {len(sigmas) - 1}",
        "runs": str(runs), "latent": "x".join(map(str, job.latent["samples"].shape[1:])),
    }  # fmt: skip
    return Trajectory(model, jobs, finals, states, torch.cat(grams), teacher, elements, about)


def flat(latent: Any) -> torch.Tensor:
    """A latent, or several of one batch, as fp32 [B, n]."""
    parts = latent.unbind() if getattr(latent, "is_nested", False) else [latent]
    return torch.cat([p.detach().float().reshape(p.shape[0], -1) for p in parts], 1)


class Student:
    """The sampler of a table."""

    def __init__(self, table: olss.Table):
        self.table = table

    def __call__(self, model, x, sigmas, extra_args=None, callback=None, disable=None):
        table, extra_args = self.table, extra_args or {}
        check(table, sigmas)
        start, ones, velocities = x, x.new_ones([x.shape[0]]), []
        mask = extra_args.get("denoise_mask")
        for k in range(table.steps):
            denoised = model(x, sigmas[k] * ones, **extra_args)
            if callback is not None:
                callback({"x": x, "i": k, "sigma": sigmas[k], "sigma_hat": sigmas[k], "denoised": denoised})
            velocities.append((x - denoised) / sigmas[k])
            self.note(x, velocities[-1])
            made = olss.combine(table, k, start, velocities)
            if mask is not None:  # what is given goes straight to its latent, whatever was fitted for the rest
                made = made * mask + (x + velocities[-1] * (sigmas[k + 1] - sigmas[k])) * (1 - mask)
            x = made
        self.note(x)
        return x

    def note(self, x: torch.Tensor, velocity: torch.Tensor | None = None) -> None:
        """Of every state, and of the last one without a velocity; for those who watch."""


class Watched(Student):
    """A student whose newest run is kept as a recorder keeps its teacher's."""

    def __init__(self, table: olss.Table, elements: int):
        super().__init__(table)
        self.kept = Recorder("euler", elements)

    def __call__(self, *given, **named):
        self.kept.states, self.kept.velocities = [], []
        return super().__call__(*given, **named)

    def note(self, x, velocity=None):
        self.kept.states.append(self.kept.thin(x))
        if velocity is not None:
            self.kept.velocities.append(self.kept.thin(velocity))


def check(table: olss.Table, sigmas: torch.Tensor) -> None:
    """ValueError where the sampler is given another schedule than it was fitted for."""
    known = table.sigmas.tolist()
    given = [float(s) for s in sigmas]
    if len(known) != len(given) or any(abs(a - b) > 1e-3 * max(known) for a, b in zip(known, given, strict=True)):
        shown = ", ".join(f"{s:.4g}" for s in known)
        raise ValueError(
            f"This OLSS sampler was fitted to {table.steps} steps at the sigmas {shown}, and got {len(given) - 1} steps "
            f"from {given[0]:.4g} to {given[-1]:.4g}; connect the sigmas of the same node, with full denoise."
        )


def sampler_of(table: olss.Table) -> Any:
    """SAMPLER."""
    return comfy.samplers.KSAMPLER(Student(table))
