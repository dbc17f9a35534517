"""The token pyramid of hierarchical_sparse.py: sizes of its levels, which slots of a list are left out, lists by key.

Level 0 are the N tokens, level l has N_l = ceil(N_(l-1) / block) nodes. The levels 1 .. L are stored one behind the
other along one axis of M = N_1 + .. + N_L rows: pooled keys, pooled values and the lists, whose row (l, i) names the
nodes of level l that node i of level l chose.

Segment l of the attention is its part over keys of level l. For l < L these are the children of what the query's
ancestor on level l + 1 chose, `width` times `block` slots; for l = L all N_L nodes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Pyramid:
    tokens: int
    block: int
    levels: int

    @property
    def sizes(self) -> list[int]:
        """N_0 .. N_L."""
        sizes = [self.tokens]
        for _ in range(self.levels):
            sizes.append(-(-sizes[-1] // self.block))
        return sizes

    @property
    def rows(self) -> int:
        """M."""
        return sum(self.sizes[1:])

    def at(self, level: int) -> slice:
        """Where level 1 .. L lies among the M rows."""
        start = sum(self.sizes[1:level])
        return slice(start, start + self.sizes[level])

    def counts(self, level: int, device: torch.device) -> torch.Tensor:
        """int64 [N_l]: tokens that each node stands for."""
        span = self.block**level
        return (self.tokens - span * torch.arange(self.sizes[level], device=device)).clamp(max=span)


def chosen_slots(idx: torch.Tensor, cnt: torch.Tensor, pyramid: Pyramid) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots whose node is chosen itself, so that its own children serve instead: (inner int8 [B, H, M - N_L, W block],
    slots of the parent's list; top int8 [B, H, N_L, N_L]) for idx [B, H, M, W], cnt [B, H, M]."""
    block, levels, (b, h, m, width) = pyramid.block, pyramid.levels, idx.shape
    held = torch.arange(width, device=idx.device) < cnt[..., None]
    inner = idx.new_zeros(b, h, m - pyramid.sizes[levels], width * block + 1, dtype=torch.int8)
    one = inner.new_ones(()).expand(b, h, 1, 1)
    for level in range(1, levels):
        own, above, n = pyramid.at(level), pyramid.at(level + 1), pyramid.sizes[level]
        parents = idx[:, :, above].masked_fill(~held[:, :, above], 1 << 30)
        parents = parents.repeat_interleave(block, 2)[:, :, :n].contiguous()
        wanted = (idx[:, :, own] // block).contiguous()
        slot = torch.searchsorted(parents, wanted).clamp_max(width - 1)
        found = (parents.gather(3, slot) == wanted) & held[:, :, own]
        slot = torch.where(found, slot * block + idx[:, :, own] % block, width * block)
        inner[:, :, own].scatter_(3, slot, one.expand(slot.shape))
    at, n = pyramid.at(levels), pyramid.sizes[levels]
    top = idx.new_zeros(b, h, n, n + 1, dtype=torch.int8)
    top.scatter_(3, torch.where(held[:, :, at], idx[:, :, at], n).long(), one.expand(b, h, n, width))
    return inner[..., :-1].contiguous(), top[..., :-1].contiguous()


def by_key(idx: torch.Tensor, cnt: torch.Tensor, nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Who chose each node: idx [B, H, n, W], cnt [B, H, n] -> (start int32 [B, H, nodes + 1], entry int32 [B, H, n W]).
    entry[start[j]] .. entry[start[j + 1] - 1] are the places i W + slot of j in idx, ascending."""
    width = idx.shape[3]
    held = torch.arange(width, device=idx.device) < cnt[..., None]
    node, entry = idx.masked_fill(~held, nodes).flatten(2).sort(dim=-1, stable=True)
    first = torch.arange(nodes + 1, dtype=node.dtype, device=idx.device).expand(*idx.shape[:2], -1)
    return torch.searchsorted(node, first.contiguous()).int(), entry.int()


def blocks_of(x: torch.Tensor, block: int) -> torch.Tensor:
    """[n, D] -> contiguous [ceil(n / block), block D], zeros at the end."""
    return F.pad(x, (0, 0, 0, -x.shape[0] % block)).reshape(-1, block * x.shape[1])
