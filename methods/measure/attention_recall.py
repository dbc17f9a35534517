"""How much attention mass a sparse pattern would keep, measured inside a running model.

The recall of a query is the share of its softmax that lies on keys it would still see: the text and every other token,
which patterns leave dense, and the image keys of the pattern. One minus recall bounds what is lost: the output changes
by at most twice that times the largest value. Only sampled queries are measured, a few heads at a time, so that no
matrix of all tokens by all tokens ever exists.
"""

import itertools
from collections import Counter
from dataclasses import dataclass, field

import torch

from ...archs import Layout
from ..attention.call import Answer, AttentionCall, Decline
from .patterns import Curve, Settings, curve

SCORES = 1 << 23  # scores held at once
PLACES = 6  # decimals of a recall: what lies below is rounding


@dataclass
class Found:
    """What was measured: the mean recall fp64 [V] of every (block, step), as a sum and how many rows are in it."""

    steps: frozenset[int]
    curve: Curve | None = None
    layout: Layout | None = None  # of the first call; others may have other text beside the same grid
    sums: dict[tuple[int, int], tuple[torch.Tensor, int]] = field(default_factory=dict)
    missed: Counter = field(default_factory=Counter)  # calls that could not be measured, by reason

    def add(self, place: tuple[int, int], recall: torch.Tensor, rows: int) -> None:
        held, count = self.sums.get(place, (torch.zeros_like(recall), 0))
        self.sums[place] = held + recall, count + rows

    def curves(self) -> dict[tuple[int, int], torch.Tensor]:
        """(block, step) -> recall [V], on the CPU."""
        return {place: (total / rows).cpu() for place, (total, rows) in sorted(self.sums.items())}


@dataclass(frozen=True, eq=False)
class AttentionRecall:
    """A method that answers no call: it looks, and leaves the call to the model. blocks None: all."""

    settings: Settings
    found: Found  # outlives the run; its owner reads it
    samples: int = 128
    seed: int = 0

    @property
    def spatial(self) -> bool:
        """Whether it means nothing where tokens have no places."""
        return self.settings.pattern != "tokens"

    def begin(self) -> Found:
        return self.found

    def attend(self, state: Found, call: AttentionCall) -> Answer:
        place = call.block.number, call.forward.run.clock.step
        if place[1] in state.steps:
            self.measure(state, call, place)
        raise Decline("measured only")

    def measure(self, state: Found, call: AttentionCall, place: tuple[int, int]) -> None:
        q, layout = call.q, call.layout
        if layout is None or (q.shape[2], call.k.shape[2]) != (layout.total, layout.total):
            state.missed["token layout unknown"] += 1
            return
        if state.curve is None or state.layout is None:
            state.layout = layout
            state.curve = curve(self.settings, layout, self.samples, self.seed, q.device)
        if layout.grid != state.layout.grid:
            state.missed["another size than the first"] += 1
            return
        streams = len(call.forward.keys)
        each = max(1, q.shape[0] // streams)
        for row in range(0, q.shape[0], each):  # the first of each stream: pictures of a batch are alike
            state.add(place, recall(state.curve, call, row), 1)


def recall(pattern: Curve, call: AttentionCall, row: int) -> torch.Tensor:
    """Mean over heads and sampled queries of one batch row, fp64 [V]."""
    layout = call.layout
    if layout is None:
        raise ValueError("A call of unknown layout has no image keys.")
    q, k, at = call.q[row], call.k[row], layout.image
    group, picked = q.shape[0] // k.shape[0], pattern.queries + at.start
    scores = pattern.prepare(q[:, at], k[:, at])
    heads, samples, keys = q.shape[0], len(picked), k.shape[1]
    step, width = max(1, SCORES // (samples * keys)), max(1, SCORES // keys)
    total = torch.zeros(len(pattern.values), dtype=torch.float64, device=q.device)
    for start, first in itertools.product(range(0, heads, step), range(0, samples, width)):
        mine, part = slice(start, min(start + step, heads)), slice(first, min(first + width, samples))
        own = torch.arange(mine.start, mine.stop, device=q.device) // group
        rows = picked[part]
        logits = (q[mine][:, rows].float() @ k[own].float().transpose(1, 2)).mul_(call.scale)
        share = _masked(logits, call.mask, row, mine, rows).softmax(-1)
        text = share[..., : at.start].sum(-1, dtype=torch.float64) + share[..., at.stop :].sum(-1, dtype=torch.float64)
        kept = pattern.keep(share[..., at], scores[mine, part], part) + text[..., None]
        total += kept.nan_to_num(1.0).clamp_(max=1.0).sum((0, 1))  # a query that sees nothing loses nothing
    return total / (heads * samples)


def _masked(logits: torch.Tensor, mask: torch.Tensor | None, row: int, heads: slice, queries: torch.Tensor):
    """logits [h, S, M] with the rows of a mask [B or 1, H or 1, N or 1, M] that belong to them."""
    if mask is None:
        return logits
    mask = mask[row if mask.shape[0] > 1 else 0]
    mask = mask[heads] if mask.shape[0] > 1 else mask
    mask = mask[:, queries] if mask.shape[1] > 1 else mask
    return logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.float()
