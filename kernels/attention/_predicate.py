"""Which query may see which key, decided per element from integer coordinates (t, y, x) of both tokens.

A token with t < 0 is text, a register or another token without a place: it sees everything and is seen by everything.

    circle          dy^2 + dx^2 < r^2 and |dt| <= rt          CLEAR, arXiv 2412.16112 (the inequality is strict)
    square          |dy| < r and |dx| < r and |dt| <= rt
    band            |dx| <= r and |dt| <= rt                   x = position in the frame or in the sequence
    frame_tile      equal t, or y != 0 on either side          Efficient-vDiT, arXiv 2502.06155 (y: reference frame)
    block_diagonal  equal t, y and x                           windows and segments: coordinates are window numbers
"""

import torch

from .._triton import tl, triton

RULES = {"none": 0, "circle": 1, "square": 2, "band": 3, "frame_tile": 4, "block_diagonal": 5}


def rule_number(rule: str) -> int:
    """Number by which the kernels know a rule; ValueError names the rules."""
    if rule not in RULES:
        raise ValueError(f"Unknown attention rule {rule!r}. Use one of {', '.join(RULES)}.")
    return RULES[rule]


def allowed(rule: str, q: torch.Tensor, k: torch.Tensor, radius: int, temporal_radius: int) -> torch.Tensor:
    """Coordinates q [..., M, 3+] and k [..., N, 3+], any integer type -> bool [..., M, N]."""
    (tq, yq, xq), (tk, yk, xk) = (c[..., :3].unbind(-1) for c in (q, k))
    free = (tq < 0)[..., :, None] | (tk < 0)[..., None, :]

    def apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a[..., :, None] - b[..., None, :]

    if rule == "circle":
        seen = apart(yq, yk).square_().add_(apart(xq, xk).square_()) < radius * radius
    elif rule == "square":
        seen = (apart(yq, yk).abs_() < radius) & (apart(xq, xk).abs_() < radius)
    elif rule == "band":
        seen = apart(xq, xk).abs_() <= radius
    elif rule == "frame_tile":
        return (apart(tq, tk) == 0) | (yq != 0)[..., :, None] | (yk != 0)[..., None, :] | free
    elif rule == "block_diagonal":
        return (apart(tq, tk) == 0) & (apart(yq, yk) == 0) & (apart(xq, xk) == 0) | free
    else:
        raise ValueError(f"Unknown attention rule {rule!r}. Use one of {', '.join(r for r in RULES if r != 'none')}.")
    return seen & (apart(tq, tk).abs_() <= temporal_radius) | free


@triton.jit
def places(C, n, step, live):
    """Coordinates t, y, x of tokens n; 0 where not live."""
    t = tl.load(C + n * step, mask=live, other=0)
    y = tl.load(C + n * step + 1, mask=live, other=0)
    x = tl.load(C + n * step + 2, mask=live, other=0)
    return t, y, x


@triton.jit
def rule_allows(tq, yq, xq, tk, yk, xk, R, RT, RULE: tl.constexpr):
    """The same table on one tile: coordinates of queries [M] and keys [N] -> bool [M, N]."""
    dt = tl.abs(tq[:, None] - tk[None, :])
    dy = tl.abs(yq[:, None] - yk[None, :])
    dx = tl.abs(xq[:, None] - xk[None, :])
    if RULE == 1:
        seen = (dy * dy + dx * dx < R * R) & (dt <= RT)
    elif RULE == 2:
        seen = (dy < R) & (dx < R) & (dt <= RT)
    elif RULE == 3:
        seen = (dx <= R) & (dt <= RT)
    elif RULE == 4:
        seen = (dt == 0) | (yq != 0)[:, None] | (yk != 0)[None, :]
    else:
        seen = (dt == 0) & (dy == 0) & (dx == 0)
    return seen | (tq < 0)[:, None] | (tk < 0)[None, :]
