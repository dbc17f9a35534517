"""What norm_modulate.py and gated_norm_modulate.py share: checks, the torch form, the launches."""

import torch

from .._triton import triton
from ._rows import WIDEST_BACKWARD, norm_backward, norm_forward, warps

WIDEST = 8192  # channels that one program holds
ROWS = 16  # rows whose shares of a vector's gradient one program adds


def check(x: torch.Tensor, kind: str, **modulation: torch.Tensor) -> None:
    """x [B, N, C]; modulation by vector [B or 1, C] or per token [B or 1, N, C]."""
    if kind not in ("layer", "rms"):
        raise ValueError(f"Unknown norm {kind!r}; choose layer or rms.")
    if x.ndim != 3 or 0 in x.shape or not x.is_floating_point():
        raise ValueError(f"Tokens must be floating point [B, N, C] and not empty, got {[*x.shape]} {x.dtype}.")
    b, n, c = x.shape
    for name, m in modulation.items():
        if m.dtype != x.dtype or tuple(m.shape) not in ((b, c), (1, c), (b, n, c), (1, n, c)):
            raise ValueError(f"{name} {[*m.shape]} {m.dtype} must be {[b, c]} or {[b, n, c]} of {x.dtype}.")


def exact(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def spread(m: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Modulation as a view [B, N, C], without a copy."""
    return (m if m.ndim == 3 else m[:, None]).expand(x.shape)


def gathered(g: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Gradient [B, N, C] of spread(m) -> that of m."""
    g = g if m.ndim == 3 else g.sum(1)
    return (g if g.shape[0] == m.shape[0] else g.sum(0, keepdim=True)).to(m.dtype).contiguous()


def normalised(x: torch.Tensor, kind: str, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """norm(x) in fp32 and what it multiplied by, [B, N, 1]."""
    x = exact(x)
    x = x if kind == "rms" else x - x.mean(-1, keepdim=True)
    share = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * share, share


def forward(x, scale, shift, kind, eps):
    """norm(x) (1 + scale) + shift in torch, [B, N, C] of x's dtype."""
    y, _ = normalised(x, kind, eps)
    return (y * (1 + exact(spread(scale, x))) + exact(spread(shift, x))).to(x.dtype).contiguous()


def backward(g, x, scale, shift, kind, eps):
    """Gradients of x (in fp32), scale and shift."""
    y, share = normalised(x, kind, eps)
    g = exact(g)
    of_scale = gathered(g * y, scale)
    of_shift = gathered(g.clone() if shift.ndim == 3 else g, shift)  # an op must not return what it was given
    g = g * (1 + exact(spread(scale, x)))
    d = g - y * (g * y).mean(-1, keepdim=True)
    d = d if kind == "rms" else d - g.mean(-1, keepdim=True)
    return d * share, of_scale, of_shift


def serves(x: torch.Tensor, backward: bool = False) -> bool:
    return x.dtype != torch.float64 and x.shape[-1] <= (WIDEST_BACKWARD if backward else WIDEST)


def _ready(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _padded(channels: int) -> int:
    return max(16, 1 << (channels - 1).bit_length())


def launch_forward(x, h, gate, scale, shift, kind, eps):
    """Kernel form -> (x', y); h and gate None: x' is x."""
    x, (b, n, c) = _ready(x), x.shape
    y = x.new_empty(b, n, c)
    total = y if h is None else x.new_empty(b, n, c)
    hidden = x if h is None else _ready(h)
    gate, scale, shift = (x if m is None else _ready(spread(m, x)) for m in (gate, scale, shift))
    norm_forward[(n, b)](
        x, hidden, gate, scale, shift, total, y, n, c, eps, *x.stride()[:2], *hidden.stride()[:2], *gate.stride()[:2],
        *scale.stride()[:2], *shift.stride()[:2], RMS=kind == "rms", GATED=h is not None, BC=_padded(c),
        num_warps=warps(_padded(c), False),
    )  # fmt: skip
    return (x if h is None else total), y


def launch_backward(g, gx, x, h, gate, scale, shift, kind, eps):
    """Kernel form: x is what was normalised -> gradients of x (and the residual), h, gate, scale, shift."""
    (b, n, c), gated = x.shape, h is not None
    # one kernel flag speaks for scale and shift, so a vector beside a per-token partner is gathered after it
    each, each_gate = scale.ndim == 3 or shift.ndim == 3, gated and gate.ndim == 3
    g, x = _ready(g), _ready(x)
    gx, hidden = (_ready(t) if gated else g for t in (gx, h))
    wide = (_ready(spread(m, x)) if m is not None else x for m in (gate, scale))
    opened, scaled = wide
    programs = triton.cdiv(n, ROWS)
    dx, dh = x.new_empty(b, n, c), (x.new_empty(b, n, c) if gated else x.new_empty(0))
    of_scale, of_shift, of_gate = (
        x.new_empty(b, n if per else programs, c, dtype=torch.float32) for per in (each, each, each_gate)
    )
    norm_backward[(programs, b)](
        g, gx, x, hidden, opened, scaled, dx, dh, of_gate, of_scale, of_shift, n, c, ROWS, eps, *g.stride()[:2],
        *gx.stride()[:2], *x.stride()[:2], *hidden.stride()[:2], *opened.stride()[:2], *scaled.stride()[:2],
        RMS=kind == "rms", GATED=gated, EACH=each, EACH_GATE=each_gate, BC=_padded(c),
        num_warps=warps(_padded(c), True), num_stages=1,
    )  # fmt: skip
    dgate = gathered(of_gate, gate) if gated else dh
    return dx, dh, dgate, gathered(of_scale, scale), gathered(of_shift, shift)
