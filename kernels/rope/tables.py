"""Tables of rotary position embedding, and ways to stretch them beyond the size that a model was trained at.

An axis of `dim` channels turns its pair i by position times w_i = theta^(-2 i / dim) (RoPE, arXiv 2104.09864). With a
training window of L positions, a span L' and s = max(L' / L, 1), the methods replace w (s = 1 changes nothing):

    linear   w / s                                         (position interpolation, arXiv 2306.15595)
    ntk      theta becomes theta s^(dim / (dim - 2))       (arXiv 2309.00071, section 3.1)
    yarn     UltraFlux's released code: a ramp from linear to ntk, then one from that to w, between pair numbers at
             which a pair makes beta and gamma turns over L
    yarn_paper   (1 - g) w / s + g w, g a ramp over the turns r = L w / 2 pi of a pair, 0 at the first bound, 1 at the
             second (YaRN, arXiv 2309.00071, section 3.2; UltraFlux, arXiv 2511.18050)

Resonance first rounds r to whole turns, so that a trained window holds whole waves: in yarn_paper every pair, to one
turn at least; elsewhere only pairs with r >= 1. Both yarns multiply the rotation by 0.1 ln s + 1 on their axis.

A table has ComfyUI's form, [.., N, P, 2, 2] of ((cos, -sin), (sin, cos)), computed in fp64 and stored in fp32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

METHODS = ("base", "linear", "ntk", "yarn", "yarn_paper")


@dataclass(frozen=True)
class Axis:
    """One axis of positions: `dim` channels (even), base `theta`; window L and span L' in positions of that axis."""

    dim: int
    theta: float = 10000.0
    method: str = "base"
    window: float = 1.0
    span: float = 1.0
    resonance: bool = False
    beta: tuple[float, float] = (1.25, 0.75)  # turns, yarn: linear to ntk
    gamma: tuple[float, float] = (16.0, 2.0)  # turns, yarn: that to unscaled
    turns: tuple[float, float] = (1.0, 32.0)  # yarn_paper: bounds of its ramp
    magnify: bool = True  # both yarns: scale the rotation's length

    def __post_init__(self):
        if self.dim < 2 or self.dim % 2 or self.theta <= 1:
            raise ValueError(f"An axis needs an even number of channels and theta above 1: {self.dim}, {self.theta}.")
        if self.method not in METHODS:
            raise ValueError(f"Unknown position method {self.method!r}; choose from {[*METHODS]}.")
        if self.window <= 0 or self.span <= 0:
            raise ValueError(f"Window and span of an axis must be positive, got {self.window} and {self.span}.")

    @property
    def stretch(self) -> float:
        return max(self.span / self.window, 1.0)


def _snapped(omega: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Each pair's turns over the window rounded to whole ones."""
    turns = axis.window * omega / (2 * math.pi)
    if axis.method == "yarn_paper":
        return 2 * math.pi * (turns + 0.5).floor().clamp(min=1) / axis.window
    return torch.where(turns >= 1, 2 * math.pi * turns.round() / axis.window, omega)


def _ramp(axis: Axis, bounds: tuple[float, float], pairs: torch.Tensor) -> torch.Tensor:
    """1 up to the pair that makes bounds[0] turns over the window, 0 from that of bounds[1] on."""

    def pair_of(turns: float) -> float:
        return axis.dim * math.log(axis.window / (2 * math.pi * turns)) / (2 * math.log(axis.theta))

    low = max(math.floor(pair_of(bounds[0])), 0)
    high: float = min(math.ceil(pair_of(bounds[1])), axis.dim - 1, axis.dim // 2)
    high = high + 1e-3 if high == low else high
    return 1 - ((pairs - low) / (high - low)).clamp(0, 1)


def frequencies(axis: Axis, device: torch.device | str = "cpu") -> tuple[torch.Tensor, float]:
    """Turning speeds w of the axis, fp64 [dim / 2], and the length of its rotations."""
    # the form of ComfyUI's rope(), so that an unscaled table is bit-equal
    exponent = torch.linspace(0, (axis.dim - 2) / axis.dim, axis.dim // 2, dtype=torch.float64, device=device)
    omega, s = 1.0 / (axis.theta**exponent), axis.stretch
    if axis.method == "base" or s == 1:
        return omega, 1.0
    omega = _snapped(omega, axis) if axis.resonance else omega
    magnitude = 0.1 * math.log(s) + 1 if axis.magnify and axis.method.startswith("yarn") else 1.0
    if axis.method == "linear":
        return omega / s, 1.0
    if axis.method == "yarn_paper":
        turns, (low, high) = axis.window * omega / (2 * math.pi), axis.turns
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return omega * (keep + (1 - keep) / s), magnitude
    base = axis.theta * s ** (axis.dim / (axis.dim - 2)) if axis.dim > 2 else axis.theta
    ntk = base ** (omega.log() / math.log(axis.theta))
    if axis.method == "ntk":
        return ntk, 1.0
    pairs = torch.arange(axis.dim // 2, dtype=torch.float64, device=device)
    slow, fast = _ramp(axis, axis.beta, pairs), _ramp(axis, axis.gamma, pairs)
    return (omega / s * (1 - slow) + ntk * slow) * (1 - fast) + omega * fast, magnitude


def table(positions: torch.Tensor, axes: Sequence[Axis]) -> torch.Tensor:
    """positions [.., N, A], any numbers, one column for each of A axes -> fp32 [.., N, P, 2, 2], P half the channels of
    all axes. Tokens may share or repeat positions. Raises ValueError when A is not the number of axes."""
    if positions.ndim < 2 or positions.shape[-1] != len(axes):
        raise ValueError(f"Positions {[*positions.shape]} must have one column for each of {len(axes)} axes.")
    device = torch.device("cpu") if positions.device.type == "mps" else positions.device  # needs fp64
    at, parts = positions.to(device, torch.float32).double(), []
    for i, axis in enumerate(axes):
        omega, magnitude = frequencies(axis, device)
        angle = at[..., i, None] * omega
        cos, sin = angle.cos() * magnitude, angle.sin() * magnitude
        parts.append(torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2)))
    return torch.cat(parts, -3).to(positions.device, torch.float32)


def grid_positions(
    grid: Sequence[int], origin: Sequence[float] | None = None, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Positions of a grid (N,), (H, W) or (T, H, W) in raster order from `origin`, fp32 [N, axes]."""
    lines = [torch.arange(n, dtype=torch.float32, device=device) for n in grid]
    if origin is not None:
        lines = [line + start for line, start in zip(lines, origin, strict=True)]
    return torch.cartesian_prod(*lines).reshape(-1, len(lines))


def apply(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """Turns neighbouring channels: x [B, H, N, D], freqs [N, P, 2, 2] or [B or 1, N, P, 2, 2] -> like x. The kernels of
    comfy_kitchen serve where it is installed. Raises ValueError when D is not 2 P or N differs."""
    freqs = freqs if freqs.ndim == 5 else freqs[None]
    if x.ndim != 4 or freqs.shape[-4:] != (x.shape[2], x.shape[3] // 2, 2, 2) or len(freqs) not in (1, len(x)):
        raise ValueError(f"The table {[*freqs.shape]} does not fit {[*x.shape]}: [.., N, D / 2, 2, 2], [B, H, N, D].")
    freqs = freqs[:, None]
    try:
        import comfy_kitchen
    except ImportError:
        return _turned(x, freqs)
    return _turned(x, freqs) if x.dtype == torch.float64 else comfy_kitchen.apply_rope1(x, freqs)


def _turned(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    pairs = x.to(exact).unflatten(-1, (-1, 1, 2))
    return (freqs.to(exact) * pairs).sum(-1).flatten(-2).to(x.dtype)
