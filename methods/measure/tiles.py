"""How much each number of reference frames of Attention Tile would cost each block, and which numbers fit a budget:
the layer-wise search of Efficient-vDiT (arXiv 2502.06155, stage 2).

The paper gives a block the sparsest mask whose loss stays under a threshold and does not name the loss; here it is the
relative squared error of the attention output, |o_k - o|^2 / |o|^2, or one minus the cosine, over evenly spaced image
tokens, averaged over the calls that are looked at. The masks of all candidates are applied to one set of scores, in
fp32, so the cost is that of one dense attention of the sampled queries."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ..attention.call import Answer, AttentionCall, Decline
from ..attention.tile import frames_of, kept_tiles

METRICS = ("rel_mse", "cosine")
QUERIES = 256  # sampled of each call
SCORES = 1 << 24  # formed at once, elements
Found = dict[int, dict[int, float]]  # block -> candidate -> mean loss


@dataclass
class Losses:
    """Sums over the calls of each block, of a clip of that many frames."""

    frames: int = 0
    total: dict[int, dict[int, float]] = field(default_factory=dict)
    calls: dict[int, int] = field(default_factory=dict)

    def add(self, block: int, found: dict[int, float]) -> None:
        kept = self.total.get(block, {})
        self.total[block] = {k: kept.get(k, 0.0) + loss for k, loss in found.items()}
        self.calls[block] = self.calls.get(block, 0) + 1

    def mean(self) -> Found:
        return {n: {k: x / self.calls[n] for k, x in found.items()} for n, found in sorted(self.total.items())}


@dataclass(frozen=True)
class TileProbe:
    """Measures calls and leaves every one to the others, so that the run is the plain one. steps: how many of the run's
    steps are looked at, evenly spaced, the first and the last among them."""

    candidates: tuple[int, ...]
    layout: str = "even"
    metric: str = "rel_mse"
    steps: int = 4
    spatial: ClassVar[bool] = True

    def begin(self) -> Losses:
        return Losses()

    def attend(self, state: Losses, call: AttentionCall) -> Answer:
        clock = call.forward.run.clock
        if clock.step not in probed(clock.steps, self.steps):
            raise Decline("not a step that is measured")
        if call.layout is None:
            raise Decline("token layout unknown")
        if call.layout.grid[0] == 1:
            raise Decline("a single frame")
        if call.layout.grid[0] != (state.frames or call.layout.grid[0]):
            raise Decline("another number of frames than the first call's")
        try:
            found = losses(call, self.candidates, self.layout, self.metric)
        except ValueError as reason:
            raise Decline(str(reason)) from reason
        state.frames = call.layout.grid[0]
        state.add(call.block.number, dict(zip(self.candidates, found, strict=True)))
        raise Decline("measured")


def probed(steps: int, count: int) -> set[int]:
    """At most `count` of the steps 0..steps-1, evenly spaced."""
    if count >= steps:
        return set(range(steps))
    return {round(i * (steps - 1) / (count - 1)) for i in range(count)} if count > 1 else {(steps - 1) // 2}


def sampled(call: AttentionCall) -> torch.Tensor:
    """int64: the image queries that are looked at, evenly spaced over the clip."""
    image = call.layout.image  # type: ignore[union-attr]
    n = image.stop - image.start
    count = min(n, QUERIES)
    return image.start + torch.arange(count) * n // count + (n // count) // 2


def losses(call: AttentionCall, candidates: Sequence[int], layout: str, metric: str) -> list[float]:
    """The loss of each number of reference frames in this call, over all its rows and heads. ValueError where the mask
    differs between queries."""
    grid, where = call.layout.grid, call.layout.image  # type: ignore[union-attr]
    bias, at = call.key_bias(), sampled(call)
    frame = [frames_of(grid, k, layout) for k in candidates]
    rows = [f[at - where.start] for f in frame]
    hidden = []  # bool [queries, image tokens] of each candidate
    for f, r in zip(frame, rows, strict=True):
        hidden.append(((f[None] != r[:, None]) & (f[None] >= 0) & (r[:, None] >= 0)).to(call.q.device))
    group = call.q.shape[1] // call.k.shape[1]
    wrong = torch.zeros(len(candidates), 3, dtype=torch.float64, device=call.q.device)  # |o_k-o|^2 |o|^2 or cosines
    step = max(1, SCORES // (len(at) * call.k.shape[2]))
    at = at.to(call.q.device)
    for b in range(call.q.shape[0]):
        for start in range(0, call.q.shape[1], step):
            heads = torch.arange(start, min(start + step, call.q.shape[1]), device=call.q.device)
            q, own = call.q[b, heads][:, at].float(), heads // group
            k, v = call.k[b, own].float(), call.v[b, own].float()
            score = (q @ k.transpose(1, 2)).mul_(call.scale)
            if bias is not None:
                score += bias[b]
            full = score.softmax(-1) @ v
            for i, cut in enumerate(hidden):
                masked = score.clone()
                masked[..., where].masked_fill_(cut, -torch.inf)
                wrong[i] += _compare(full, masked.softmax(-1) @ v)
    top, bottom, tokens = wrong.unbind(1)
    ratio = top / bottom.clamp_min(1e-30) if metric == "rel_mse" else 1 - tokens / (call.q.shape[:2].numel() * len(at))
    return ratio.clamp_min(0).tolist()


def _compare(full: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
    """Outputs [H, S, D] -> |cut - full|^2, |full|^2 and the sum of cosines."""
    cosine = torch.nn.functional.cosine_similarity(full, cut, dim=-1)
    same = (cut == full).all(-1)  # also of rows that are 0
    return torch.stack(
        [(cut - full).square().sum(), full.square().sum(), torch.where(same, 1.0, cosine).sum()]
    ).double()


def density(frames: int, k: int | None) -> float:
    """Part of the tiles that is computed; None: dense."""
    return 1.0 if k is None else kept_tiles(frames, k) / frames**2


def within_loss(found: Found, frames: int, threshold: float) -> dict[int, int | None]:
    """Block -> the sparsest candidate whose loss stays under the threshold, None: dense."""
    plan: dict[int, int | None] = {}
    for block, losses_of in sorted(found.items()):
        fits = [k for k, loss in losses_of.items() if loss < threshold]
        best = min(fits, key=lambda k: (density(frames, k), k), default=None)
        plan[block] = None if density(frames, best) == 1 else best
    return plan


def within_density(found: Found, frames: int, budget: float) -> dict[int, int | None]:
    """Block -> candidate, None: dense, so that the mean density is at most `budget` where the candidates allow it, for
    little loss: from dense on, always the step along a block's lower hull that costs least for what it saves."""
    steps: list[tuple[float, int, int, float, int | None]] = []
    for block, losses_of in sorted(found.items()):
        hull = _hull([(1.0, 0.0, None), *((density(frames, k), loss, k) for k, loss in losses_of.items())])
        for number, (a, b) in enumerate(zip(hull, hull[1:], strict=False)):
            steps.append((_slope(a, b), block, number, a[0] - b[0], b[2]))
    plan: dict[int, int | None] = dict.fromkeys(sorted(found))
    used = float(len(plan))
    for _, block, _, saved, k in sorted(steps, key=lambda step: step[:3]):
        if used <= budget * len(plan) + 1e-9:
            break
        plan[block], used = k, used - saved
    return plan


def _hull(points: list[tuple[float, float, int | None]]) -> list[tuple[float, float, int | None]]:
    """(density, loss, k) -> the lower convex hull from density 1 down: each step costs more per pair than the last."""
    best: dict[float, tuple[float, float, int | None]] = {}
    for p in points:
        if p[0] not in best or p[1] < best[p[0]][1]:
            best[p[0]] = p
    hull: list[tuple[float, float, int | None]] = []
    for p in sorted(best.values(), key=lambda x: -x[0]):
        while hull and p[1] <= hull[-1][1] and len(hull) > 1:
            hull.pop()
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], p):
            hull.pop()
        hull.append(p)
    return hull


def _slope(a, b) -> float:
    return (b[1] - a[1]) / (a[0] - b[0])
