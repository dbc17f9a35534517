"""Record Trajectory and Solve OLSS: runs of a teacher are recorded, and the fitted sampler is tried on seeds of its own."""

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
RIVALS = ("euler", "dpmpp_2m")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Recorded runs, and what is needed to sample their jobs again."""

    model: Any
    jobs: list[Job]  # one a seed
    finals: list[torch.Tensor]  # of each job [B, n], fp32 on the CPU
    grams: torch.Tensor  # olss.Grams of all pictures, in the jobs' order
    teacher: str
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
    jobs, finals, grams = [], [], []
    for number in range(runs):
        one = seeded(dataclasses.replace(job, sampler=comfy.samplers.KSAMPLER(recorder)), number)
        finals.append(flat(sample(plain, one, progress.step).samples))
        if not torch.isfinite(finals[-1]).all():
            raise ValueError(f"The run of seed {one.noise.seed} is not finite; sample it with KSampler to see why.")
        jobs.append(one)
        grams.append(recorder.grams())
    about = {
        "model": fingerprint(model.model.diffusion_model), "cfg": f"{job.cfg:g}", "teacher": f"{teacher} {len(sigmas) - 1}",
        "runs": str(runs), "latent": "x".join(map(str, job.latent["samples"].shape[1:])),
    }  # fmt: skip
    return Trajectory(model, jobs, finals, torch.cat(grams), teacher, about)


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
            made = olss.combine(table, k, start, velocities)
            if mask is not None:  # what is given goes straight to its latent, whatever was fitted for the rest
                made = made * mask + (x + velocities[-1] * (sigmas[k + 1] - sigmas[k])) * (1 - mask)
            x = made
        return x


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


def split(trajectory: Trajectory, holdout: float) -> int:
    """How many seeds, the last ones, have no part in the fit; at least one learns, and one is held out where there are
    two and holdout is above 0."""
    runs = len(trajectory.jobs)
    return min(max(round(runs * holdout), 1 if holdout > 0 else 0), runs - 1)


def solve(
    trajectory: Trajectory, steps: int, path: str, ridge: float, prior: str, holdout: float, check: bool
) -> tuple[olss.Table, list[str]]:
    """(table, lines of a report). Of several paths the runs that were learnt from choose: sampled again with check, else
    by the fit. The held-out seeds judge what was chosen, and have no part in it."""
    held = split(trajectory, holdout)
    pictures = trajectory.finals[0].shape[0]
    count = (len(trajectory.jobs) - held) * pictures
    learn, judged = trajectory.grams[:count], trajectory.grams[count:]
    sigmas = trajectory.sigmas
    paths = olss.paths_of(path, learn, sigmas, steps, ridge, prior)
    tables = [olss.solve(learn, sigmas, points, ridge, prior) for points in paths]
    trials = Trials(trajectory, held, steps, len(tables)) if check else None
    best = 0
    if len(tables) > 1:
        errors = [
            trials.error(sampler_of(table), table.sigmas.float(), learnt=True)
            if trials
            else olss.fit_error(learn, table, points)
            for table, points in zip(tables, paths, strict=True)
        ]
        best = min(range(len(errors)), key=errors.__getitem__)
    about = {**trajectory.about, "path": path, "ridge": f"{ridge:g}", "prior": prior}
    table, points = dataclasses.replace(tables[best], about=about), paths[best]
    lines = [
        f"OLSS of {steps} steps, {path} path {', '.join(map(str, points))} of {len(sigmas) - 1}",
        f"fitted to {len(learn)} pictures; largest coefficient {table.largest:.3g}",
    ]
    if trials is not None and held:
        lines.append(f"held-out seeds ({held}), difference to the {trajectory.about['teacher']} steps of the teacher:")
        lines.append(f"  OLSS, {steps} steps: {trials.error(sampler_of(table), table.sigmas.float()):.4f}")
        lines += [f"  {name}, {steps} steps: {trials.rival(name):.4f}" for name in RIVALS]
    elif held:
        lines.append(
            f"held-out pictures, with the teacher's velocities: error {olss.fit_error(judged, table, points):.4f}"
        )
    return table, lines


class Trials:
    """Runs of few steps, compared with the teacher's: from the seeds that were learnt from, or the held-out ones."""

    def __init__(self, trajectory: Trajectory, held: int, steps: int, paths: int):
        self.plain, self.sigmas, self.steps = metered(trajectory.model), trajectory.sigmas, steps
        known = list(zip(trajectory.jobs, trajectory.finals, strict=True))
        learnt = len(known) - held
        self.learnt, self.held = known[:learnt], known[learnt:]
        runs = held * (1 + len(RIVALS)) + (learnt * paths if paths > 1 else 0)
        self.progress = Progress(runs * steps)

    def error(self, sampler: Any, sigmas: torch.Tensor, learnt: bool = False) -> float:
        found = []
        for job, want in self.learnt if learnt else self.held:
            again = dataclasses.replace(job, sampler=sampler, sigmas=sigmas)
            found.append(relative(flat(sample(self.plain, again, self.progress.step).samples), want))
        return sum(found) / len(found)

    def rival(self, name: str) -> float:
        """A sampler of core, evenly spaced in the teacher's schedule."""
        even = [self.sigmas[p] for p in olss.uniform_path(len(self.sigmas) - 1, self.steps)]
        return self.error(comfy.samplers.sampler_object(name), torch.tensor(even))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm().clamp_min(1e-12))
