"""Normalisation and modulation in one pass: y = norm(x) (1 + scale) + shift.

norm is the layer norm without weights, (x - mean) / sqrt(var + eps), or the RMS norm, x / sqrt(mean x^2 + eps), over the
channels: the adaptive norm of DiT (arXiv 2212.09748, section 3.2). scale and shift are vectors [B, C], or one a token
[B, N, C], as where tokens of one sequence have different noise levels or conditions (DynamiCtrl, arXiv 2503.21246).
Bandwidth bound: a row is read once and written once.
"""

import torch

from .._triton import on_gpu
from ._passes import backward, check, forward, launch_backward, launch_forward, serves


def reference(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, kind: str = "layer", eps: float = 1e-6
) -> torch.Tensor:
    """x [B, N, C], any strides; scale, shift [B, C] or [B, N, C] (B or 1); kind layer or rms -> [B, N, C].

    Computes in fp32, fp64 in fp64. Raises ValueError when shapes, dtypes or the kind do not fit.
    """
    check(x, kind, scale=scale, shift=shift)
    return forward(x, scale, shift, kind, eps)


norm_modulate = torch.library.custom_op("tessera::norm_modulate", reference, mutates_args=())
norm_modulate.register_fake(lambda x, *_, **__: x.new_empty(x.shape))


@on_gpu(norm_modulate)
def launch(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, kind: str = "layer", eps: float = 1e-6
) -> torch.Tensor:
    """As reference, which serves fp64 and more than 8192 channels."""
    if not serves(x):
        return reference(x, scale, shift, kind, eps)
    check(x, kind, scale=scale, shift=shift)
    return launch_forward(x, None, None, scale, shift, kind, eps)[1]


def backward_reference(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, kind: str, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, scale and shift."""
    dx, dscale, dshift = backward(grad, x, scale, shift, kind, eps)
    return dx.to(x.dtype).contiguous(), dscale, dshift


norm_modulate_backward = torch.library.custom_op("tessera::norm_modulate_backward", backward_reference, mutates_args=())
norm_modulate_backward.register_fake(
    lambda grad, x, scale, shift, *_: tuple(t.new_empty(t.shape) for t in (x, scale, shift))
)


@on_gpu(norm_modulate_backward)
def launch_backward_op(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, kind: str, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not serves(x, backward=True):
        return backward_reference(grad, x, scale, shift, kind, eps)
    got = launch_backward(grad, None, x, None, None, scale, shift, kind, eps)
    return got[0], got[3], got[4]


def _save(ctx, inputs, output):
    x, scale, shift, ctx.kind, ctx.eps = inputs
    ctx.save_for_backward(x, scale, shift)


def _gradients(ctx, grad):
    return *norm_modulate_backward(grad, *ctx.saved_tensors, ctx.kind, ctx.eps), None, None


norm_modulate.register_autograd(_gradients, setup_context=_save)


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """FLUX width, modulation by vector."""
    x, scale, shift = (torch.randn(*s, 3072, device=device).to(dtype) for s in ((1, tokens), (1,), (1,)))
    return x, scale, shift
