"""What several LoRA add to one layer, measured and weighed against each other (after LiON-LoRA, arXiv 2507.05678).

A LoRA's delta is D = U V with U [N, r], V [r, K], so <D_i, D_j> = sum((U_i' U_j) * (V_i V_j')): O((N + K) r^2), and no
N x K matrix is formed. Norm balance scales D_i by (T / |D_i|)^beta. Symmetric (Loewdin) orthogonalisation turns unit
deltas E into G^(-1/2) E, G their Gram matrix, and gives each its norm back: the orthogonal set nearest to the deltas, none
of them preferred. It is linear in them, so what a layer gets in the end is again a sum of the given deltas, with other
weights. That is all a MODEL has to be told, for every kind of adapter that is linear in its strength.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

TARGETS = ("geomean", "first", "none")
PARALLEL = 1e-3  # least eigenvalue of the cosines below which deltas have no directions of their own


@dataclass(frozen=True)
class Factors:
    """A delta up @ down; its scale is in `up`."""

    up: torch.Tensor  # [N, r] fp32
    down: torch.Tensor  # [r, K] fp32


Piece = Factors | torch.Tensor  # of one tensor; a dense one of any shape
Delta = Mapping[str, Piece]  # of one layer, by tensor: weight and bias


def joined(pieces: Sequence[Factors]) -> Factors:
    """Their sum, exact: ranks add up."""
    if len(pieces) == 1:
        return pieces[0]
    return Factors(torch.cat([p.up for p in pieces], 1), torch.cat([p.down for p in pieces]))


def features(delta: Delta, rows: torch.Tensor) -> Delta:
    """What a delta of a linear layer adds to its output for inputs rows [n, K], over sqrt(n): its norm is the root mean
    square of the change of a token's features. The same kinds of pieces, so factors stay factors."""
    x = rows.float().T / len(rows) ** 0.5
    weight = [piece for name, piece in delta.items() if not name.endswith("bias")]
    bias = [piece for name, piece in delta.items() if name.endswith("bias")]
    ones = x.new_full((1, len(rows)), len(rows) ** -0.5)
    low = [Factors(b.flatten()[:, None], ones) for b in bias if isinstance(b, torch.Tensor)]
    low += [Factors(piece.up, piece.down @ x) for piece in weight if isinstance(piece, Factors)]
    made: list[torch.Tensor] = [piece.flatten(1) @ x for piece in weight if isinstance(piece, torch.Tensor)]
    if not made:
        return {"output": joined(low)} if low else {}
    return {"output": sum((f.up @ f.down for f in low), made[0])}


def inner(a: Piece, b: Piece) -> float:
    """<a, b>, entry by entry; a and b are deltas of the same tensor."""
    if isinstance(a, Factors) and isinstance(b, Factors):
        return float(((a.up.T @ b.up) * (a.down @ b.down.T)).double().sum())
    if isinstance(b, Factors):
        a, b = b, a
    if isinstance(a, Factors):
        return float(((a.up.T @ b.flatten(1)) * a.down).double().sum())  # type: ignore[union-attr]
    return float((a.double() * b.double()).sum())  # type: ignore[union-attr]


def gram(deltas: Sequence[Delta]) -> torch.Tensor:
    """fp64 [k, k]: the inner products of k deltas of one layer. An empty delta is zero."""
    made = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    for i, a in enumerate(deltas):
        for j, b in enumerate(deltas[: i + 1]):
            made[i, j] = made[j, i] = sum(inner(piece, b[name]) for name, piece in a.items() if name in b)
    return made


def norms(products: torch.Tensor) -> torch.Tensor:
    """[k] of a Gram matrix [k, k]."""
    return products.diagonal().clamp_min(0).sqrt()


def cosines(products: torch.Tensor) -> torch.Tensor:
    """[k, k] of a Gram matrix; 0 where one of the two is zero."""
    n = norms(products)
    made = products / (n[:, None] * n[None]).clamp_min(1e-300)
    return torch.where((n[:, None] > 0) & (n[None] > 0), made.clamp(-1, 1), 0.0)


def balance(n: Sequence[float], target: str, beta: float) -> list[float]:
    """Factors that bring norms n towards one norm: all the way at beta 1. The target is the geometric mean of those that
    are not zero, or the first one's. Exactly 1 where there is nothing to balance."""
    there = [i for i, value in enumerate(n) if value > 0]
    if target == "none" or len(there) < 2 or (target == "first" and not n[0] > 0):
        return [1.0] * len(n)
    wanted = math.log(n[0]) if target == "first" else sum(math.log(n[i]) for i in there) / len(there)
    return [math.exp(beta * (wanted - math.log(n[i]))) if i in there else 1.0 for i in range(len(n))]


def orthogonal(products: torch.Tensor) -> torch.Tensor | None:
    """C [k, k] fp64 with D'_i = sum_j C_ij D_j orthogonal and |D'_i| = |D_i|, of a Gram matrix. Identity where all are
    orthogonal already, and for zero deltas; None where some are parallel and no such set is near them."""
    n = norms(products)
    there = [i for i in range(len(n)) if n[i] > 0]
    made = torch.eye(len(n), dtype=torch.float64)
    if len(there) < 2:
        return made
    among = cosines(products)[there][:, there]
    values, vectors = torch.linalg.eigh(among)
    if values[0] < PARALLEL:
        return None
    root = (vectors / values.sqrt()) @ vectors.T
    rows = n[there]
    for a, i in enumerate(there):
        for b, j in enumerate(there):
            made[i, j] = root[a, b] * rows[a] / rows[b]
    return made


@dataclass(frozen=True)
class Weighed:
    """One layer's result. factors: by which each LoRA's strength is multiplied."""

    factors: tuple[float, ...]
    fused: torch.Tensor  # [k, k] fp64: row i is D'_i in terms of the deltas at strength 1
    parallel: bool = False  # deltas that were to be orthogonal, and cannot be


def weigh(products: torch.Tensor, strengths: Sequence[float], target: str, beta: float, orthogonalize: bool) -> Weighed:
    """products: the Gram matrix [k, k] of the deltas at strength 1, at which they are balanced; strengths come after."""
    b = balance(norms(products).tolist(), target, beta)
    scaled = torch.tensor([s * f for s, f in zip(strengths, b, strict=True)], dtype=torch.float64)
    made = orthogonal(products * scaled[:, None] * scaled[None]) if orthogonalize else None
    if made is None or torch.equal(made, torch.eye(len(b), dtype=torch.float64)):
        return Weighed(tuple(b), torch.diag(scaled), orthogonalize and made is None)
    sums = made.sum(0).tolist()
    return Weighed(tuple(f * total for f, total in zip(b, sums, strict=True)), made * scaled[None])
