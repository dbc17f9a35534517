"""A gated residual and the norm that follows it, in one pass:

    x' = x + gate h        y = norm(x') (1 + scale) + shift

the seam between two branches of a DiT block (arXiv 2212.09748, section 3.2). Done apart, x' is written, read and read
again; here each tensor moves once. norm and the forms of gate, scale and shift are those of norm_modulate.py.
"""

import torch

from .._triton import on_gpu
from ._passes import backward, check, exact, forward, gathered, launch_backward, launch_forward, serves, spread


def _check(x, h, gate, scale, shift, kind) -> None:
    check(x, kind, gate=gate, scale=scale, shift=shift)
    if h.shape != x.shape or h.dtype != x.dtype:
        raise ValueError(f"The branch {[*h.shape]} {h.dtype} must be like x {[*x.shape]} {x.dtype}.")


def reference(
    x: torch.Tensor,
    h: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    kind: str = "layer",
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, h [B, N, C], any strides; gate, scale, shift [B, C] or [B, N, C] (B or 1) -> x', y [B, N, C].

    Computes in fp32, fp64 in fp64; y is that of the x' that is returned. Raises ValueError when shapes, dtypes or the
    kind do not fit.
    """
    _check(x, h, gate, scale, shift, kind)
    total = (exact(x) + exact(spread(gate, x)) * exact(h)).to(x.dtype).contiguous()
    return total, forward(total, scale, shift, kind, eps)


gated_norm_modulate = torch.library.custom_op("tessera::gated_norm_modulate", reference, mutates_args=())
gated_norm_modulate.register_fake(lambda x, *_, **__: (x.new_empty(x.shape), x.new_empty(x.shape)))


@on_gpu(gated_norm_modulate)
def launch(
    x: torch.Tensor,
    h: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    kind: str = "layer",
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference, which serves fp64 and more than 8192 channels."""
    if not serves(x):
        return reference(x, h, gate, scale, shift, kind, eps)
    _check(x, h, gate, scale, shift, kind)
    return launch_forward(x, h, gate, scale, shift, kind, eps)


def backward_reference(
    grad_total: torch.Tensor,
    grad: torch.Tensor,
    total: torch.Tensor,
    h: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    kind: str,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, h, gate, scale and shift from those of x' (total) and y."""
    d, dscale, dshift = backward(grad, total, scale, shift, kind, eps)
    d = d + exact(grad_total)
    dh = (d * exact(spread(gate, h))).to(h.dtype).contiguous()
    return d.to(h.dtype).contiguous(), dh, gathered(d * exact(h), gate), dscale, dshift


gated_norm_modulate_backward = torch.library.custom_op(
    "tessera::gated_norm_modulate_backward", backward_reference, mutates_args=()
)
gated_norm_modulate_backward.register_fake(
    lambda a, b, total, h, *mods: tuple(t.new_empty(t.shape) for t in (total, h, *mods[:3]))
)


@on_gpu(gated_norm_modulate_backward)
def launch_backward_op(
    grad_total: torch.Tensor,
    grad: torch.Tensor,
    total: torch.Tensor,
    h: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    kind: str,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if not serves(h, backward=True):
        return backward_reference(grad_total, grad, total, h, gate, scale, shift, kind, eps)
    return launch_backward(grad, grad_total, total, h, gate, scale, shift, kind, eps)


def _save(ctx, inputs, output):
    _, h, gate, scale, shift, ctx.kind, ctx.eps = inputs
    ctx.save_for_backward(output[0], h, gate, scale, shift)


def _gradients(ctx, grad_total, grad):
    got = gated_norm_modulate_backward(grad_total, grad, *ctx.saved_tensors, ctx.kind, ctx.eps)
    return *got, None, None


gated_norm_modulate.register_autograd(_gradients, setup_context=_save)


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """FLUX width, modulation by vector."""
    x, h, *modulation = (torch.randn(*s, 3072, device=device).to(dtype) for s in [(1, tokens)] * 2 + [(1,)] * 3)
    return x, h, *modulation
