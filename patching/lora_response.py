"""A LoRA's response to its strength, measured on a job of the user's own."""

import itertools
from typing import Any

import torch
from comfy_api.latest import io

from ..methods.control.lora_curve import Curve
from .lora import Lora
from .lora_stack import put
from .sampling import Job, Progress, metered, sample

CurveSocket = io.Custom("TESSERA_CURVE")  # methods/control/lora_curve.py: Curve


def with_lora(model: Any, lora: Lora, strength: float, clip: Any = None) -> tuple[Any, Any]:
    """As core's Load LoRA: at strength 0 both are what they were."""
    if strength == 0:
        return model, clip
    return put(model, clip, [lora], [strength], [])


def measure(model: Any, job: Job, lora: Lora, strengths: tuple[float, ...], what: str) -> Curve:
    """Samples the job once for each strength, with the same noise."""
    steps = len(job.sigmas) - 1
    if steps < 1:
        raise ValueError(f"Calibrate LoRA Strength needs at least 2 sigmas, got {len(job.sigmas)}; raise the steps.")
    progress = Progress(len(strengths) * steps)
    made: dict[float, float] = {}
    plain = None
    for strength in sorted(strengths, key=abs):  # from 0, which the others are compared with
        patched = with_lora(metered(model), lora, strength)[0]
        latent = _first(sample(patched, job, progress.step).samples)
        if not torch.isfinite(latent).all():
            raise ValueError(f"{lora.name} at strength {strength:g} gives a latent that is not finite; ask for less.")
        plain = latent if plain is None else plain
        made[strength] = response(latent, plain, what)
    return Curve(lora.name, what, strengths, tuple(made[s] for s in strengths))


def _first(samples: Any) -> torch.Tensor:
    """fp32; of several latents (video and sound) the first."""
    return (samples.unbind()[0] if getattr(samples, "is_nested", False) else samples).float()


def response(latent: torch.Tensor, plain: torch.Tensor, what: str) -> float:
    """latent [B, C, (T,) H, W]. difference: mean |latent - plain|; motion: mean |frame - frame before|."""
    if what == "difference":
        return float((latent - plain).abs().mean())
    if latent.ndim != 5 or latent.shape[2] < 2:
        raise ValueError(
            f"measure motion needs a video of at least 2 latent frames, got a latent {[*latent.shape]}. Take difference."
        )
    return float((latent[:, :, 1:] - latent[:, :, :-1]).abs().mean())


def lines(curve: Curve) -> list[str]:
    """For the node's panel."""
    unit = "mean |latent - that at strength 0|" if curve.measure == "difference" else "mean |frame - frame before|"
    made = [f"{curve.lora}: {unit}"]
    for strength, value in zip(curve.strengths, curve.responses, strict=True):
        made.append(f"strength {strength:g}: {value:.5g}, amount {curve.amount(strength):.3f}")
    asked = [step / 4 for step in itertools.takewhile(lambda s: s / 4 <= curve.most, range(1, 9))]
    made.append("amount -> strength: " + ", ".join(f"{u:g} -> {curve.strength(u):.3f}" for u in asked))
    if any(a != b for a, b in zip(curve.signed, curve.fitted, strict=True)):
        made.append("The response goes up and down; it was smoothed. A larger batch measures it more steadily.")
    return made
