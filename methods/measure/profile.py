"""What a characterisation of a network says: shares, intensity, and which of compute, memory, attention or the work outside
the network is in the way (Generative AI Beyond LLMs, arXiv 2312.14385)."""

from collections.abc import Mapping
from dataclasses import dataclass

RIDGE = {"cuda": 150.0, "cpu": 10.0}  # FLOPs a byte at which usual devices turn from memory-bound to compute-bound
ATTENTION, OUTSIDE = 0.4, 0.4  # shares from which they are the bottleneck


@dataclass(frozen=True)
class Measured:
    """Shares 0..1 by kind of operator. times: of a measured step, None where nothing was timed."""

    flops: Mapping[str, float]
    times: Mapping[str, float] | None
    intensity: float  # FLOPs a byte of the linear layers
    device: str
    offloaded: bool = False  # weights do not all fit on the device
    around: float = 0.0  # of the time of a picture, that of text encoder and VAE


def shares(values: Mapping[str, float]) -> dict[str, float]:
    """Of their sum; zeros where that is 0."""
    total = sum(values.values())
    return {name: value / total if total > 0 else 0.0 for name, value in values.items()}


def bottleneck(found: Measured) -> tuple[str, str]:
    """("attention", "memory", "compute", "outside" or "elementwise", a sentence that says why)."""
    by = found.times or found.flops
    basis = "of the time" if found.times else "of the arithmetic"
    attention, outside = by.get("attention", 0.0), by.get("outside", 0.0)
    products = by.get("linear", 0.0) + by.get("convolution", 0.0)
    rest = by.get("other", 0.0) + by.get("norm", 0.0)
    ridge = RIDGE.get(found.device, RIDGE["cuda"])
    if found.around >= OUTSIDE:
        return "outside", f"text encoder and VAE take {found.around:.0%} of the time of a picture, sampling the rest"
    if found.times and outside >= OUTSIDE:
        return (
            "outside",
            f"{outside:.0%} of a step passes outside of the network: sampler, guidance, casting, ControlNets",
        )
    if attention >= ATTENTION:
        return "attention", f"attention takes {attention:.0%} {basis}, and grows with the square of the tokens"
    if found.offloaded:
        return "memory", "the weights do not all fit on the device and are moved there at every step"
    if rest > products and rest > attention:
        return "elementwise", f"{rest:.0%} of the time goes into norms and elementwise work, which only moves memory"
    if found.intensity < ridge:
        return "memory", (
            f"linear layers do {found.intensity:.3g} FLOPs for each byte that they move; below some {ridge:g} memory is slower "
            "than arithmetic"
        )
    return "compute", f"matrix products take {products:.0%} {basis}, at {found.intensity:.3g} FLOPs a byte"
