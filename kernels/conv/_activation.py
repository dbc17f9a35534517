"""Activations of the convolution kernels and their derivatives, in torch and in Triton."""

import torch

from .._triton import tl, triton

ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}
TANH = 1.5957691216057308, 0.044715  # gelu_tanh(x) = x sigmoid(1.596 (x + 0.0447 x^3)), which is its tanh form


def activate(x: torch.Tensor, name: str) -> torch.Tensor:
    if name == "silu":
        return torch.nn.functional.silu(x)
    if name == "gelu_tanh":
        return torch.nn.functional.gelu(x, approximate="tanh")
    return torch.nn.functional.gelu(x) if name == "gelu" else x


def slope(x: torch.Tensor, name: str) -> torch.Tensor:
    """Derivative at x."""
    if name == "silu":
        s = x.sigmoid()
        return s * (1 + x * (1 - s))
    if name == "gelu_tanh":
        s = torch.sigmoid(TANH[0] * (x + TANH[1] * x**3))
        return s + x * s * (1 - s) * TANH[0] * (1 + 3 * TANH[1] * x * x)
    if name == "gelu":
        return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x * x) * 0.3989422804014327
    return torch.ones_like(x)


@triton.jit
def activated(x, KIND: tl.constexpr):
    if KIND == 1:
        return x * tl.sigmoid(x)
    elif KIND == 2:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == 3:
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return x


@triton.jit
def activated_slope(x, KIND: tl.constexpr):
    if KIND == 1:
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif KIND == 2:
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif KIND == 3:
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        return x * 0.0 + 1.0
