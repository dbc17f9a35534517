"""Solvers of a rectified flow dx/dsigma = v(x, sigma), in either direction.

rf_solver is RF-Solver (arXiv 2411.04746): a second-order Taylor step x + h v + h^2/2 v', whose v' is the difference quotient
of v over half the step. Written out, the terms in v(x) cancel and the explicit midpoint rule is left. A rule of even order
loses one order less on a round trip than its error suggests: the leading errors of there and back cancel, so inversion
followed by sampling returns to its start with order 3. fireflow takes the slope at the last midpoint in place of that at
the step's start: one evaluation a step."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

Field = Callable[[torch.Tensor, float], torch.Tensor]  # v(x [B, ...], sigma)
Told = Callable[[int, torch.Tensor, torch.Tensor], None]  # step, x at its start, the slope that it takes


@dataclass(frozen=True)
class Rule:
    """Explicit Runge-Kutta rule: stage s is at `nodes[s]` of the step, reached along stage s - 1."""

    nodes: tuple[float, ...]
    weights: tuple[float, ...]

    def slope(self, field: Field, x: torch.Tensor, at: float, h: float) -> torch.Tensor:
        stages: list[torch.Tensor] = []
        for node in self.nodes:
            stages.append(field(x + node * h * stages[-1] if stages else x, at + node * h))
        return sum((w * k for w, k in zip(self.weights, stages, strict=True) if w), start=torch.zeros_like(x))


EULER = Rule((0.0,), (1.0,))
MIDPOINT = Rule((0.0, 0.5), (0.0, 1.0))
RALSTON = Rule((0.0, 0.5, 0.75), (2 / 9, 1 / 3, 4 / 9))
RULES = {"rf_solver": MIDPOINT, "fireflow": MIDPOINT, "euler": EULER, "ralston_3": RALSTON}
SOLVERS = tuple(RULES)


def evaluations(solver: str, steps: int, euler_last: bool = False) -> int:
    """Evaluations of the field that a run asks for."""
    whole = steps - euler_last if steps else 0
    if solver == "fireflow":
        return whole + (whole > 0) + (steps - whole)
    return whole * len(RULES[solver].nodes) + (steps - whole)


def solve(
    field: Field,
    x: torch.Tensor,
    sigmas: Sequence[float],
    solver: str = "rf_solver",
    told: Told | None = None,
    steps: Iterable[int] | None = None,
    euler_last: bool = False,
) -> torch.Tensor:
    """x [B, ...] at sigmas[0] -> at sigmas[-1]. steps: range(len(sigmas) - 1), or what counts it aloud. euler_last: the
    last step is one of Euler's. The field is never asked at sigmas[-1]."""
    last = len(sigmas) - 2
    middle = None  # fireflow: the slope at the last midpoint
    for i in range(last + 1) if steps is None else steps:
        at, h = sigmas[i], sigmas[i + 1] - sigmas[i]
        if euler_last and i == last:
            slope = EULER.slope(field, x, at, h)
        elif solver == "fireflow":
            start = field(x, at) if middle is None else middle
            slope = middle = field(x + h / 2 * start, at + h / 2)
        else:
            slope = RULES[solver].slope(field, x, at, h)
        if told is not None:
            told(i, x, slope)
        x = x + h * slope
    return x


def velocity(denoise: Callable[[torch.Tensor, float], torch.Tensor], floor: float = 0.0) -> Field:
    """The field of a model that predicts the clean latent, v = (x - x0) / sigma. Below `floor` it is that at floor: at
    sigma 0 nothing is left to tell it, and close above it rounding is (3e-5 of v at 1e-3 in fp32)."""

    def field(x: torch.Tensor, sigma: float) -> torch.Tensor:
        at = max(sigma, floor)
        return (x - denoise(x, at)) / x.new_full((), at)  # CUDA divides by a number as a product with its inverse

    return field


def omega_scale(omega: float) -> float:
    """ACE-Step's logistic map of omega onto the factor of a step, 0.9 to 1.1; 0 gives 1."""
    return 0.9 + 0.2 / (1.0 + math.exp(-0.1 * omega))


def scaled_about_mean(dx: torch.Tensor, factor: float, mask: torch.Tensor | None = None) -> torch.Tensor:
    """dx [B, ...], its deviation from each row's mean times `factor`. mask [B, ...] 0..1: where, and over what the mean
    is taken; elsewhere dx stays."""
    if factor == 1.0:
        return dx
    inner = tuple(range(1, dx.ndim))
    if mask is None:
        mean = dx.mean(inner, keepdim=True)
        return (dx - mean) * factor + mean
    mask = mask.expand_as(dx)
    mean = (dx * mask).sum(inner, keepdim=True) / mask.sum(inner, keepdim=True).clamp_min(1e-12)
    return dx + (dx - mean) * (factor - 1.0) * mask
