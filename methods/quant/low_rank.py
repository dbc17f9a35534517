"""Low-rank branches: SVDQuant's (arXiv 2411.05007), which carries what a few bits cannot, and those that stand for a known
difference of low rank, such as a LoRA's, exactly.

SVDQuant: W ~ U D + Q(W - U D) with U [N, r], D [r, K] in 16 bit. The residual has less range than W. The first split is
W's own leading one; each further pass takes the leading part of W - Q, which is what the codes missed, and keeps the
better of the two.
"""

import math
from collections.abc import Callable

import torch

OVERSAMPLED = 16
POWERS = 3  # passes of the range finder: the spectra of weights fall slowly
SMALL = 256  # min(N, K) up to which the decomposition is exact


def leading(matrix: torch.Tensor, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """matrix [N, K] -> up [N, r] and down [r, K], fp32, r = min(rank, N, K): the nearest product of that rank, exact for
    small matrices or large ranks, and otherwise by a randomized range finder with power passes (the same on every device)."""
    w = matrix.float()
    r = min(rank, *w.shape)
    if r <= 0 or not w.any():
        return w.new_zeros(w.shape[0], max(r, 0)), w.new_zeros(max(r, 0), w.shape[1])
    if min(w.shape) <= SMALL or 2 * (r + OVERSAMPLED) >= min(w.shape):
        u, s, v = torch.linalg.svd(w, full_matrices=False)
    else:
        q = _range(w, r + OVERSAMPLED, POWERS, seed)
        u, s, v = torch.linalg.svd(q.T @ w, full_matrices=False)
        u = q @ u
    root = s[:r].sqrt()  # shared evenly, so that neither factor leaves the range of 16 bit
    return (u[:, :r] * root).contiguous(), (root[:, None] * v[:r]).contiguous()


def split(
    weight: torch.Tensor,
    rank: int,
    round_trip: Callable[[torch.Tensor], torch.Tensor],
    importance: torch.Tensor | None = None,
    passes: int = 2,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """weight [N, K] -> (up [N, r], down [r, K], relative squared error of up down + round_trip(weight - up down)), fp32.
    round_trip: the quantizer, [N, K] to what it comes back as. importance [K]: weigh columns by its root. The caller packs
    weight - up @ down."""
    w = weight.float()
    root = None if importance is None else _root(importance.to(w.device))

    def decompose(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if root is None:
            return leading(matrix, rank, seed)
        up, down = leading(matrix * root, rank, seed)
        return up, down / root

    def miss(matrix: torch.Tensor) -> float:
        return float((matrix if root is None else matrix * root).square().sum())

    size = max(miss(w), 1e-300)
    up, down = decompose(w)
    best = (up, down, torch.inf)
    for _ in range(passes):
        residual = w - up @ down
        near = round_trip(residual)
        error = miss(residual - near) / size
        if error < best[2]:
            best = (up, down, error)
        if error == 0 or not up.shape[1]:
            break
        up, down = decompose(w - near)
    return best


def low_rank_of(
    delta: torch.Tensor, tolerance: float = 1e-5, max_rank: int = 256, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """delta [N, K], of low but unknown rank -> up [N, r], down [r, K] fp32 of the smallest r with
    |delta - up down| <= tolerance |delta| (Frobenius); r = 0 for zeros. None where that takes more than max_rank, or where
    the factors would take as much memory as delta itself. Probes what is left of delta with ever more random vectors."""
    left = delta.float()
    n, k = left.shape
    size = float(left.square().sum())
    if not math.isfinite(size):
        raise ValueError(f"The difference [{n}, {k}] holds numbers that are not finite; take another file.")
    most, allowed = min(max_rank, (n * k - 1) // (n + k)), tolerance * tolerance * size
    basis, parts, missed = left.new_zeros(n, 0), [left.new_zeros(0, k)], size
    generator = torch.Generator().manual_seed(seed)
    while missed > allowed:
        done = basis.shape[1]
        count = min(max(16, done) + (0 if done else OVERSAMPLED), most + OVERSAMPLED - done, min(n, k) - done)
        if count <= 0:
            return None
        q = torch.linalg.qr(left @ torch.randn(k, count, generator=generator).to(left.device)).Q
        q = torch.linalg.qr(q - basis @ (basis.T @ q)).Q
        part = q.T @ left
        left = left - q @ part
        basis, missed = torch.cat((basis, q), 1), float(left.square().sum())
        parts.append(part)
        if missed > max(allowed, size * (1 - 0.5 * basis.shape[1] / (most + OVERSAMPLED))):
            return None  # of rank r, d vectors are expected to find at least d / r
    return _trim(basis, torch.cat(parts), missed, allowed, most)


def _trim(q: torch.Tensor, inside: torch.Tensor, missed: float, allowed: float, most: int):
    """The fewest leading directions of q [N, p] inside [p, K] that leave no more than `allowed`, squared, of which `missed`
    lies outside; None beyond `most`."""
    u, s, v = torch.linalg.svd(inside, full_matrices=False)
    tails = s.cpu().double().square().flip(0).cumsum(0).flip(0)  # [p], what is left without the directions from here on
    r = int((tails + missed > allowed).sum())
    if r > most:
        return None
    root = s[:r].sqrt()
    return (q @ u[:, :r]) * root, root[:, None] * v[:r]


def _range(w: torch.Tensor, size: int, powers: int, seed: int) -> torch.Tensor:
    """Orthonormal [N, size] whose span holds most of w [N, K]."""
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(w.shape[1], size, generator=generator).to(w.device)
    q = torch.linalg.qr(w @ probe).Q
    for _ in range(powers):
        q = torch.linalg.qr(w @ torch.linalg.qr(w.T @ q).Q).Q
    return q


def _root(importance: torch.Tensor) -> torch.Tensor:
    """[K], the root of importances of mean 1, none below a hundredth: a division follows."""
    h = importance.float()
    return (h / h.mean().clamp_min(1e-30)).sqrt().clamp_min(1e-2)
