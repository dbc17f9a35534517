"""Forward and backward of selective_scan.py in torch. The tokens are cut into about sqrt(N) chunks, all chunks take one
step together, and the states between chunks follow one after another: 3 sqrt(N) steps instead of N, no number that a
plain recurrence would not form, and no product of decays is ever divided out again.

Channels stand in groups, state [B, C, G, R, S]. With l_t the gradient of h_t and m_t = exp(delta_t A) l_t that of
h_{t-1}, which run from the last token to the first:

    l_t = C_t dy_t + m_{t+1}    du = delta (l . B) + skip dy    dB = delta u l    dC = dy h
    ddelta = u (l . B) + (A m_t h_{t-1} summed over S)          dA = delta m_t h_{t-1}
"""

import math
from typing import Any

import torch
from torch.nn.functional import pad

from ._reference import exact

HELD = 1 << 22  # numbers of the states of one run of chunks that backward keeps


class Tokens:
    """Rows of a scan in its order, [B, C, L, ..] in full precision: u, delta and more of width G R; b, c [.., G, S]."""

    def __init__(self, u, delta, a, b, c, reverse: bool):
        (n, channels), self.groups = u.shape[1:], b.shape[1]
        self.length = min(128, max(8, math.isqrt(n)))
        self.count = -(-n // self.length)
        self.reverse, self.n = reverse, n
        self.dtype = exact(u[:0]).dtype
        self.a = a.to(self.dtype).unflatten(0, (self.groups, channels // self.groups))
        self.u, self.delta = self.channels(u), self.channels(delta)
        self.b, self.c = (self.rows(x.transpose(1, 2)) for x in (b, c))
        self.total = (self.delta.sum(2)[..., None] * self.a).exp()

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, ..] -> [B, C, L, ..]."""
        x = x.to(self.dtype)
        if self.reverse:
            x = x.flip(1)
        missing = self.count * self.length - self.n
        return pad(x, (*(0, 0) * (x.ndim - 2), 0, missing)).unflatten(1, (self.count, self.length))

    def channels(self, x: torch.Tensor) -> torch.Tensor:
        return self.rows(x).unflatten(3, (self.groups, -1))

    def back(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """[B, C, L, ..] -> [B, N, ..] in the tokens' own order, dtype and memory order of `like`."""
        x = x.flatten(1, 2)[:, : self.n]
        x = x.flip(1) if self.reverse else x
        return torch.empty_like(like).copy_(x.reshape(like.shape))

    def decay(self, at: Any, i: int) -> torch.Tensor:
        """exp(delta A) of step i [B, c, G, R, S]."""
        return (self.delta[:, at, i, :, :, None] * self.a).exp_()

    def step(self, h: torch.Tensor, at: Any, i: int) -> torch.Tensor:
        """The states after token i of the chunks `at`."""
        fed = (self.delta[:, at, i] * self.u[:, at, i])[..., None] * self.b[:, at, i, :, None]
        return torch.addcmul(fed, self.decay(at, i), h)


def _start(t: Tokens, state: torch.Tensor | None) -> torch.Tensor:
    if state is not None:
        return state.to(t.dtype).unflatten(1, t.a.shape[:2])
    return torch.zeros(t.u.shape[0], *t.a.shape, dtype=t.dtype, device=t.u.device)


def _carry(t: Tokens, parts: torch.Tensor, run: torch.Tensor, backward: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What each chunk adds -> the state before each chunk, and the one behind the last."""
    before = torch.empty_like(parts)
    for i in reversed(range(t.count)) if backward else range(t.count):
        before[:, i] = run
        run = torch.addcmul(parts[:, i], t.total[:, i], run)
    return before, run


def _states(t: Tokens, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    every, h = slice(None), torch.zeros_like(t.total)
    for i in range(t.length):
        h = t.step(h, every, i)
    return _carry(t, h, _start(t, state), False)


def forward(u, delta, a, b, c, skip, state, reverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, N, D] and the final state [B, D, S]."""
    t, every = Tokens(u, delta, a, b, c, reverse), slice(None)
    h, last = _states(t, state)
    y = torch.empty_like(t.u)
    for i in range(t.length):
        h = t.step(h, every, i)
        y[:, :, i] = (h @ t.c[:, :, i, :, :, None]).squeeze(-1)
    if skip is not None:
        y += t.u * skip.to(t.dtype).view(t.a.shape[:2])
    return t.back(y, u), last.flatten(1, 2)


def backward(grad, grad_state, u, delta, a, b, c, skip, state, reverse: bool):
    """Gradients of u, delta, a, b, c, skip (None where not given) and the state."""
    t, every = Tokens(u, delta, a, b, c, reverse), slice(None)
    dy = t.channels(grad)
    m = torch.zeros_like(t.total)
    for i in reversed(range(t.length)):
        m = (m + dy[:, :, i, :, :, None] * t.c[:, :, i, :, None]) * t.decay(every, i)
    behind, first = _carry(t, m, _start(t, grad_state), True)
    before, _ = _states(t, state)
    du, ddelta, db, dc = (torch.empty_like(x) for x in (t.u, t.delta, t.b, t.c))
    da = torch.zeros_like(t.a)
    run = max(1, HELD // (before[:, 0].numel() * t.length))
    for start in range(0, t.count, run):
        at = slice(start, start + run)
        h = [before[:, at]]
        for i in range(t.length):
            h.append(t.step(h[-1], at, i))
        m = behind[:, at]
        for i in reversed(range(t.length)):
            given, weight = dy[:, at, i], t.delta[:, at, i]
            grown = m + given[..., None] * t.c[:, at, i, :, None]
            m = grown * t.decay(at, i)
            passed = m * h[i]
            fed = (grown @ t.b[:, at, i, :, :, None]).squeeze(-1)
            du[:, at, i], ddelta[:, at, i] = weight * fed, t.u[:, at, i] * fed + (t.a * passed).sum(-1)
            db[:, at, i] = ((weight * t.u[:, at, i])[..., None, :] @ grown).squeeze(-2)
            dc[:, at, i] = (given[..., None, :] @ h[i + 1]).squeeze(-2)
            da += (weight[..., None] * passed).sum((0, 1))
    dskip = None
    if skip is not None:
        du += dy * skip.to(t.dtype).view(t.a.shape[:2])
        dskip = (dy * t.u).sum((0, 1, 2)).flatten()
    db, dc = (t.back(x, like.transpose(1, 2)).transpose(1, 2) for x, like in ((db, b), (dc, c)))
    return t.back(du, u), t.back(ddelta, delta), da.flatten(0, 1), db, dc, dskip, first.flatten(1, 2)
