"""Forward and backward of delta_rule.py in torch, on chunks; only the state goes from one chunk to the next in a loop.

Inside a chunk, S the incoming state, M the decays between tokens and enter, leave as in _ssd_chunks.py, the values that
the rule really writes are W, rows w_t, and A holds what each takes from the ones before it:

    A = strictly lower of (beta K K^T * M)     (1 + A) W = beta (V - enter K S)
    O = scale (enter Q S + (Q K^T * M) W)      S' = total S + (leave K)^T W
"""

import torch

from ._reference import exact, rows_like
from ._ssd_chunks import CHUNK, Decays, chunks_of, decays, pairs, slabs, tail_sums


def gates(g, like: torch.Tensor, chunk: int, dtype: torch.dtype) -> Decays:
    """Decays of the log gate g [B, H, N]; None: nothing decays."""
    return decays(like.new_zeros(like.shape[:3], dtype=dtype) if g is None else g, chunk, False, dtype)


class Slab:
    """Rows and decays of the chunks first .. end, [B, H, c, L, ..]."""

    def __init__(self, q, k, v, beta, of: Decays, first: int, end: int):
        self.q, self.k, self.v, self.beta = (chunks_of(x, first, end, CHUNK) for x in (q, k, v, beta[..., None]))
        self.enter, self.leave = of.enter[:, :, first:end, :, None], of.leave[:, :, first:end, :, None]
        self.total = of.total[:, :, first:end, None, None]
        self.between = pairs(of.log[:, :, first:end], None, 1.0, self.k.dtype)
        self.lower = (self.k @ self.k.mT * self.between).tril_(-1)  # A without beta
        self.taken = self.beta * self.lower

    def solve(self, x: torch.Tensor) -> torch.Tensor:
        """(1 + A)^-1 x."""
        return torch.linalg.solve_triangular(self.taken, x, upper=False, unitriangular=True)

    def solve_transposed(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve_triangular(self.taken.mT, x, upper=True, unitriangular=True)


def _written(slab: Slab, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W of each chunk [B, H, c, L, E], the states before them [B, H, c, D, E] and the one behind the last."""
    e = slab.v.shape[-1]
    both = slab.solve(torch.cat((slab.beta * slab.v, slab.beta * slab.enter * slab.k), -1))
    own, per_state = both[..., :e], both[..., e:]
    leaving = (slab.leave * slab.k).mT
    states, written, run = [], [], start
    for i in range(own.shape[2]):
        states.append(run)
        written.append(own[:, :, i] - per_state[:, :, i] @ run)
        run = slab.total[:, :, i] * run + leaving[:, :, i] @ written[-1]
    return torch.stack(written, 2), torch.stack(states, 2), run


def first_state(q, v, state) -> torch.Tensor:
    if state is not None:
        return state
    return torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=exact(q[:0]).dtype, device=q.device)


def _tokens(first: int, end: int, n: int) -> slice:
    return slice(first * CHUNK, min(end * CHUNK, n))


def _put(to: torch.Tensor, tokens: slice, x: torch.Tensor) -> None:
    """Chunks x [B, H, c, L, ..] as rows of to [B, H, N, ..]."""
    to[:, :, tokens] = x.flatten(2, 3)[:, :, : tokens.stop - tokens.start].to(to.dtype)


def forward(q, k, v, beta, g, state, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, H, N, E] and the final state [B, H, D, E]."""
    (batch, heads, n, d), e = q.shape, v.shape[3]
    of, run, out = gates(g, q, CHUNK, exact(q[:0]).dtype), first_state(q, v, state), rows_like(v, e)
    for first, end in slabs(n, CHUNK, batch * heads * max(CHUNK, d, e)):
        slab = Slab(q, k, v, beta, of, first, end)
        written, states, run = _written(slab, run)
        y = slab.enter * (slab.q @ states) + (slab.q @ slab.k.mT * slab.between) @ written
        _put(out, _tokens(first, end, n), y * scale)
    return out, run.clone() if run is state else run


def _incoming(q, k, v, beta, of: Decays, state, parts: list[tuple[int, int]]) -> list[torch.Tensor]:
    """The state before each slab."""
    run, found = first_state(q, v, state), []
    for first, end in parts:
        found.append(run)
        run = _written(Slab(q, k, v, beta, of, first, end), run)[2]
    return found


def backward(grad, grad_state, q, k, v, beta, g, state, scale: float):
    """Gradients of q, k, v, beta, the log gate [B, H, N] and the state."""
    (batch, heads, n, d), e, full = q.shape, v.shape[3], exact(q[:0]).dtype
    of, back = gates(g, q, CHUNK, full), grad_state
    dq, dk, dv = (rows_like(x, x.shape[3]) for x in (q, k, v))
    dbeta, dg = (torch.zeros(batch, heads, n, dtype=full, device=q.device) for _ in range(2))
    parts = [*slabs(n, CHUNK, batch * heads * max(CHUNK, d, e))]
    starts = _incoming(q, k, v, beta, of, state, parts)
    for (first, end), start in zip(reversed(parts), reversed(starts), strict=True):
        slab = Slab(q, k, v, beta, of, first, end)
        pulled = chunks_of(grad, first, end, CHUNK) * scale
        got, back = _slab_gradients(slab, pulled, *_written(slab, start)[:2], back)
        for to, x in zip((dq, dk, dv, dbeta, dg), got, strict=True):
            _put(to, _tokens(first, end, n), x)
    return dq, dk, dv, dbeta, dg, back.clone() if back is grad_state else back


def _slab_gradients(slab: Slab, dy, w, states, back):
    """Gradients of one slab's q, k, v, beta and log gate, and of the state before it, `back` being that behind it."""
    q, k, v, beta, enter, leave = slab.q, slab.k, slab.v, slab.beta, slab.enter, slab.leave
    scores = q @ k.mT * slab.between
    from_out, per_state = scores.mT @ dy, slab.solve(beta * enter * k)
    asked, kept = (enter * q).mT @ dy, leave * k
    dw: list[torch.Tensor] = []
    backs: list[torch.Tensor] = []
    for i in reversed(range(w.shape[2])):
        backs.append(back)
        dw.append(from_out[:, :, i] + kept[:, :, i] @ back)
        back = asked[:, :, i] + slab.total[:, :, i] * back - per_state[:, :, i].mT @ dw[-1]
    behind = torch.stack(backs[::-1], 2)
    dr = slab.solve_transposed(torch.stack(dw[::-1], 2))  # of beta (V - enter K S)
    recalled = enter * (k @ states)
    da = -(dr @ w.mT).tril(-1)
    dscores = dy @ w.mT * slab.between
    entered, left = enter * (dy @ states.mT), leave * (w @ behind.mT)
    forgot = -beta * enter * (dr @ states.mT)
    inner = da * slab.between * beta
    dq = entered + dscores @ k
    dk = dscores.mT @ q + left + forgot + inner @ k + inner.mT @ k
    dbeta = (dr * (v - recalled)).sum(-1) + (da * slab.lower).sum(-1)
    # What a token's terms of + and of - its own log sum give; the last of the chunk decays the whole state, too.
    pair = dy @ w.mT * scores + da * slab.taken
    pair = pair.tril(-1)
    leaves = (left * k).sum(-1)
    net = pair.sum(-1) - pair.sum(-2) + (entered * q).sum(-1) + (forgot * k).sum(-1) - leaves
    whole = (states * behind).sum((-1, -2)) * slab.total[..., 0, 0] + leaves.sum(-1)
    return (dq, dk, beta * dr, dbeta, tail_sums(net) + whole[..., None]), back
