"""Which rotation and smoothing a layer gets: the one whose measured output error is least (adaptive rotation, LRQ-DiT,
arXiv 2508.03485).

The layer's sampled inputs X [T, K] and some of its outputs are enough: for each candidate,
    error = |X W' - A((X / s) R) Q((W s) R)'|^2 / |X W'|^2
with A the rounding of activations and Q that of weights. Rotations are tried without smoothing first, then smoothing with
the best of them and with none. The paper's own rule (mild outliers: Hadamard, salient channels: outlier-aware) is told
beside it; its thresholds are not public, ours is the largest channel over the median one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .calibration import LayerStatistics
from .codebook import TINY
from .rotation import KINDS, Rotation, block_of, rotation
from .round_trip import activations, weights
from .smooth import ALPHAS, smooth_scales

AUTO = tuple(kind for kind in KINDS if kind not in ("none", "hadamard_sylvester"))  # Sylvester's inflates constant rows
OUTPUTS, ROUNDS = 128, 8  # output channels and rounds of the refit while measuring
SALIENT = 8.0  # largest over median magnitude of channels
GAIN = 0.95  # of the error without it: a smaller change may be chance, and is not worth its time at every step


@dataclass(frozen=True, eq=False)
class Choice:
    """What a layer gets. smooth [K] divides its input and multiplies its weight's columns, or is None; errors: by what was
    tried, "kind" or "kind, alpha"; rule: what the paper's says, "" without a calibration."""

    rotation: Rotation
    smooth: torch.Tensor | None = None
    errors: dict[str, float] = field(default_factory=dict)
    fluctuation: float | None = None
    salience: float | None = None
    rule: str = ""


def output_error(
    weight: torch.Tensor,
    inputs: torch.Tensor,
    format: str,
    kind: str,
    turn: Rotation,
    smooth: torch.Tensor | None = None,
    group: int = 64,
    mean_square: torch.Tensor | None = None,
    rounds: int = ROUNDS,
) -> float:
    """Relative squared error of inputs [T, K] times weight [N, K] at this format of weights and kind of activations."""
    w, x = weight.float(), inputs.to(weight.device, torch.float32)
    want = x @ w.T
    if smooth is not None:
        w, x = w * smooth, x / smooth
    near, _ = weights(turn.apply(w), format, group, importance_of(mean_square, turn, smooth), rounds)
    got = activations(turn.apply(x), kind) @ near.T
    return float((got - want).square().sum() / want.square().sum().clamp_min(TINY))


def importance_of(mean_square: torch.Tensor | None, turn: Rotation, smooth: torch.Tensor | None) -> torch.Tensor | None:
    """Mean square [K] of each channel as the quantized product sees it."""
    if mean_square is None:
        return None
    return turn.spread(mean_square if smooth is None else mean_square / smooth.to(mean_square.device).square())


def choose(
    weight: torch.Tensor,
    format: str,
    kind: str = "none",
    group: int = 64,
    statistics: LayerStatistics | None = None,
    rotations: Sequence[str] = ("none", *AUTO),
    alphas: Sequence[float] = ALPHAS,
    seed: int = 0,
) -> Choice:
    """weight [N, K] in one of round_trip's formats, its activations of some kind. rotations: those that may be chosen, of
    which blocks fit K; alphas: of smoothing, () for none of it. Without statistics: for quantized activations the regular
    rotation where it may be chosen, for weights alone whatever lowers their error."""
    k = weight.shape[1]
    fitting = [name for name in rotations if name == "none" or block_of(name, k)] or ["none"]
    rows = _some_rows(weight, seed)
    if statistics is None or not len(statistics.rows):
        return _blind(rows, format, kind, group, fitting, seed)
    amax = statistics.amax.to(weight.device)
    squares = statistics.mean_square.to(weight.device)
    whole = weight.abs().amax(0)
    errors: dict[str, float] = {}
    found: dict[str, tuple[Rotation, torch.Tensor | None]] = {}

    def attempt(name: str, alpha: float | None) -> None:
        smooth = None if alpha is None else smooth_scales(amax, whole, alpha)
        turn = rotation(name, k, amax if smooth is None else amax / smooth, seed)
        label = name if alpha is None else f"{name}, {alpha:g}"
        errors[label] = output_error(rows, statistics.rows, format, kind, turn, smooth, group, squares)
        found[label] = (turn, smooth)

    for name in fitting:
        attempt(name, None)
    unsmoothed = sorted(errors, key=lambda label: errors[label])
    turned = [name for name in unsmoothed if name != "none"]
    for name in (*turned[:1], *(name for name in unsmoothed if name == "none")):
        for alpha in alphas:
            attempt(name, alpha)
    order = sorted(errors, key=lambda label: errors[label])
    still = next((label for label in order if label.startswith("none,")), order[0])
    plain = (label for label in ("none", still, unsmoothed[0]) if label in errors)
    label = next((label for label in plain if errors[order[0]] > GAIN * errors[label]), order[0])
    salience = float(amax.max() / amax.median().clamp_min(1e-30))
    rule = "zigzag_hadamard" if salience > SALIENT else "hadamard_regular"
    return Choice(*found[label], errors, statistics.fluctuation, salience, rule)


def _blind(rows: torch.Tensor, format: str, kind: str, group: int, fitting: Sequence[str], seed: int) -> Choice:
    """Without a calibration. zigzag_hadamard has nothing to sort by."""
    k = rows.shape[1]
    usable = [name for name in fitting if name != "zigzag_hadamard"] or ["none"]
    if kind != "none" and "hadamard_regular" in usable:
        return Choice(rotation("hadamard_regular", k))
    turns = {name: rotation(name, k, seed=seed) for name in usable}
    errors = {name: weights(turn.apply(rows), format, group, None, ROUNDS)[1].error for name, turn in turns.items()}
    best = min(errors, key=lambda name: errors[name])
    if "none" in errors and errors[best] > GAIN * errors["none"]:
        best = "none"
    return Choice(turns[best], None, errors)


def _some_rows(weight: torch.Tensor, seed: int) -> torch.Tensor:
    """Rows [min(N, 128), K] fp32, drawn from all."""
    if weight.shape[0] <= OUTPUTS:
        return weight.float()
    order = torch.randperm(weight.shape[0], generator=torch.Generator().manual_seed(seed))[:OUTPUTS]
    return weight[order.sort().values.to(weight.device)].float()
