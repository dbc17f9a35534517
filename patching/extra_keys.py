"""Keys that a control adapter puts behind a call's own: more keys than queries. A plan is given as many queries more, so that
to it the extra keys are tokens like text, which all see and which see all; what those queries gave is cut off."""

from dataclasses import dataclass, replace

import torch

from .. import archs
from ..methods.attention.call import AttentionCall


@dataclass(frozen=True)
class ExtraKeys:
    """One condition's keys behind those of every attention call in the stack, its columns with a logit bias."""

    tokens: int
    bias: float = 0.0


def count(forward, queries: int, keys: int) -> int:
    """Of the keys of a call those that were put there; 0 where none were."""
    extra = sum(e.tokens for e in forward.extra_keys)
    return extra if keys == queries + extra else 0


def layout(forward, kind, queries: int, keys: int, references: int) -> archs.Layout | None:
    """Layout of a call of that kind, its extra keys counted among the tokens behind the picture."""
    if forward.grid is None:
        return None
    arch, extra = forward.run.arch, count(forward, queries, keys)
    pad = arch.pad(forward.diffusion_model)
    return archs.layout_of(arch, forward.grid, kind, queries + extra, keys, references + extra, pad)


def widened(call: AttentionCall) -> AttentionCall:
    """The call with a query for every key."""
    missing = call.k.shape[2] - call.q.shape[2]
    if call.layout is None or missing <= 0 or call.layout.total != call.k.shape[2]:
        return call
    b, h, n, d = call.q.shape
    q = call.q.new_zeros(b, h, n + missing, d)
    q[:, :, :n] = call.q
    mask = call.mask
    if mask is not None and mask.shape[2] == n:
        mask = torch.cat([mask, mask[:, :, -1:].expand(-1, -1, missing, -1)], 2)
    return replace(call, q=q, mask=mask)
