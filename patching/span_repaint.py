"""Span Repaint: LATENT with a mask, NOISE and SIGMAS such that any SAMPLER repaints the span. Core's inpainting puts the
noised source back outside the mask at every evaluation, which is what the published loop does after every step."""

from typing import Any

import comfy.sample
import torch

from ..methods.sampling.span import Span, first_step, grown, mask_of, span_of, turned

ACE_RATE = 44100 / 512 / 8  # latent frames a second of ACE-Step 1


class SpanNoise:
    """NOISE of the whole clip from one NOISE, turned towards other noise within the span."""

    def __init__(self, noise: Any, span: Span, axis: int, variance: float, retake_seed: int):
        self.noise, self.span, self.axis, self.variance, self.retake_seed = noise, span, axis, variance, retake_seed
        self.seed = noise.seed

    def generate_noise(self, input_latent: dict[str, Any]) -> torch.Tensor:
        own = self.noise.generate_noise(input_latent)
        mask = mask_of(own, self.span, self.axis).bool()
        other = self._other(own, self.retake_seed, input_latent)
        if torch.equal(other, own):  # the same seed: two equal draws would add up to noise that is too strong
            other = self._other(own, (self.retake_seed + 1) % (1 << 64), input_latent)
        return torch.where(mask, turned(own, other, self.variance), own)

    @staticmethod
    def _other(own: torch.Tensor, seed: int, input_latent: dict[str, Any]) -> torch.Tensor:
        return comfy.sample.prepare_noise(own, seed, input_latent.get("batch_index"))


def time_axis(samples: torch.Tensor, kind: str) -> int:
    """Where a latent's time is: the last axis of sound, the third of a clip."""
    if samples.ndim == 5:
        return 2
    if samples.ndim == 3 or kind == "audio":
        return samples.ndim - 1
    raise ValueError(
        f"Span Repaint needs a latent that has time, sound or a clip, and got a picture {[*samples.shape]}. Use core's Set Latent "
        "Noise Mask for pictures."
    )


def known_rate(samples: torch.Tensor, kind: str) -> float:
    """Latent frames a second, where the latent's shape tells."""
    if samples.ndim == 4 and kind == "audio" and samples.shape[1:3] == (8, 16):
        return ACE_RATE
    raise ValueError(
        f"Span Repaint cannot tell how many latent frames {[*samples.shape]} has a second. Set rate: 25 for ACE-Step 1.5, 21.53 for "
        "Stable Audio, frames a second divided by 4 for Wan; 1 to give the span in latent frames."
    )


def repaint(latent: dict[str, Any], noise, sigmas: torch.Tensor, start: float, end: float, variance: float,
            extend: bool, rate: float, retake_seed: int) -> tuple[dict[str, Any], SpanNoise, torch.Tensor]:  # fmt: skip
    """(LATENT, NOISE, SIGMAS)."""
    samples, kind = latent["samples"], latent.get("type", "")
    if getattr(samples, "is_nested", False):
        raise ValueError(
            "Span Repaint takes one latent, and this one holds several (video and sound). Separate them first."
        )
    if latent.get("noise_mask") is not None:
        raise ValueError("The latent has a noise mask already, and Span Repaint makes one. Remove the other.")
    if len(sigmas) < 2:
        raise ValueError(
            f"Span Repaint needs sigmas of at least 1 step, got {max(len(sigmas) - 1, 0)}. Raise the steps."
        )
    axis = time_axis(samples, kind)
    span = span_of(samples.shape[axis], start, end, rate or known_rate(samples, kind), extend)
    if span.extends:
        variance = 1.0  # beyond the clip there is nothing to begin from
    longer = grown(samples, span, axis)
    made = {**latent, "samples": longer, "noise_mask": mask_of(longer, span, axis)}
    cut = sigmas[first_step(len(sigmas) - 1, variance) :]
    return made, SpanNoise(noise, span, axis, variance, retake_seed), cut
