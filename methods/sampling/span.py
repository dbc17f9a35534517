"""A span of time drawn anew, or an extension of the clip (ACE-Step, arXiv 2506.00045): from which step, from which noise,
and which latent frames."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Span:
    """before, after: latent frames that the clip grows by. start, end: latent frames of the grown clip."""

    before: int
    after: int
    start: int
    end: int

    @property
    def extends(self) -> bool:
        return self.before + self.after > 0


def span_of(frames: int, start: float, end: float, rate: float, extend: bool) -> Span:
    """start, end: seconds of a clip of `frames` latent frames, `rate` a second. ValueError where nothing is left of it, or
    it lies outside the clip and `extend` is off."""
    first, last = round(start * rate), round(end * rate)
    length = f"the clip is {frames / rate:.3g} s long ({frames} latent frames)"
    if last <= first:
        raise ValueError(
            f"The span from {start:g} s to {end:g} s holds no latent frame of {1 / rate:.3g} s; {length}. Raise end_s."
        )
    if not extend and (first < 0 or last > frames):
        raise ValueError(
            f"The span from {start:g} s to {end:g} s goes beyond the clip; {length}. Move it inside, or set extend on."
        )
    if first > frames or last < 0:
        raise ValueError(
            f"The span from {start:g} s to {end:g} s does not touch the clip; {length}. Move it to an end."
        )
    before, after = max(0, -first), max(0, last - frames)
    return Span(before, after, first + before, last + before)


def grown(x: torch.Tensor, span: Span, axis: int) -> torch.Tensor:
    """x with frames of zeros before and after along axis."""
    shape = list(x.shape)
    ends = []
    for count in (span.before, span.after):
        shape[axis] = count
        ends.append(x.new_zeros(shape))
    return torch.cat((ends[0], x, ends[1]), axis)


def mask_of(x: torch.Tensor, span: Span, axis: int) -> torch.Tensor:
    """1 within the span and 0 elsewhere, [1, 1, ...] like the grown latent x [B, C, ...]."""
    mask = torch.zeros(1, 1, *x.shape[2:])
    mask.narrow(axis, span.start, span.end - span.start).fill_(1.0)
    return mask


def first_step(steps: int, variance: float) -> int:
    """Steps that are left out: the nearer the new noise is to the old, the later a run begins."""
    return min(int(steps * (1.0 - variance) + 1e-6), steps - 1)


def turned(noise: torch.Tensor, other: torch.Tensor, variance: float) -> torch.Tensor:
    """Noise on the quarter circle from one draw to another; its variance stays 1."""
    if variance == 0:
        return noise.clone()
    angle = variance * math.pi / 2
    return math.cos(angle) * noise + math.sin(angle) * other
