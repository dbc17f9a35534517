"""More keys than queries: a control adapter puts some behind a call's own, and a block sampler those of finished frames
before them. A plan is given as many queries more, so that to it keys behind are tokens like text, which all see and which
see all, and keys before are frames of the same picture; what those queries gave is cut off."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from .. import archs
from ..kernels.attention.segment_bias import MOST, segment_bias
from ..methods.attention.call import AttentionCall
from .convention import NAMES


@dataclass(frozen=True)
class ExtraKeys:
    """One condition's keys behind those of every attention call in the stack, its columns with a logit bias."""

    tokens: int
    bias: float = 0.0


def count(forward, queries: int, keys: int) -> int:
    """Of the keys of a call those that were put there; 0 where none were."""
    extra = sum(e.tokens for e in forward.extra_keys)
    return extra if keys >= queries + extra else 0  # more where another pack put some before them


def before(forward, queries: int, keys: int) -> int:
    """Of the keys of a call those of finished frames, which stand first."""
    if not forward.before or forward.grid is None:
        return 0
    earlier = forward.before * forward.grid[1] * forward.grid[2]
    return earlier if keys >= queries + earlier else 0


def layout(forward, kind, queries: int, keys: int, references: int) -> archs.Layout | None:
    """Layout of a call of that kind, its extra keys counted among the tokens behind the picture, finished frames as the
    picture's first ones."""
    if forward.grid is None:
        return None
    arch, extra, earlier = forward.run.arch, count(forward, queries, keys), before(forward, queries, keys)
    grid = (forward.grid[0] + (forward.before if earlier else 0), *forward.grid[1:])
    pad = arch.pad(forward.diffusion_model)
    return archs.layout_of(arch, grid, kind, queries + extra + earlier, keys, references + extra, pad)


def widened(call: AttentionCall) -> AttentionCall:
    """The call with a query for every key."""
    missing = call.k.shape[2] - call.q.shape[2]
    if call.layout is None or missing <= 0 or call.layout.total != call.k.shape[2]:
        return call
    b, h, n, d = call.q.shape
    first = before(call.forward, n, call.k.shape[2])
    q = call.q.new_zeros(b, h, n + missing, d)
    q[:, :, first : first + n] = call.q
    mask = call.mask
    if mask is not None and mask.shape[2] == n:
        ends = mask[:, :, :1].expand(-1, -1, first, -1), mask[:, :, -1:].expand(-1, -1, missing - first, -1)
        mask = torch.cat([ends[0], mask, ends[1]], 2)
    return replace(call, q=q, mask=mask)


def own(call: AttentionCall, out: torch.Tensor, queries: int) -> torch.Tensor:
    """Of what a plan gave for a widened call [B, H, N, D] the part of the call's own queries."""
    first = before(call.forward, queries, call.k.shape[2]) if out.shape[2] > queries else 0
    return out[:, :, first : first + queries]


def biases(forward, call: AttentionCall) -> bool:
    """Whether logits of this call's extra keys are to be shifted."""
    shifted = any(e.bias for e in forward.extra_keys)
    return shifted and count(forward, call.q.shape[2], call.k.shape[2]) > 0


def biased(forward, call: AttentionCall) -> AttentionCall:
    """The call with the biases of its extra keys in its mask."""
    extra = count(forward, call.q.shape[2], call.k.shape[2])
    parts = [call.q.new_zeros(call.k.shape[2] - extra)]
    parts += [call.q.new_full((e.tokens,), e.bias) for e in forward.extra_keys]
    bias = torch.cat(parts)[None, None, None]
    mask = call.mask
    if mask is None:
        return replace(call, mask=bias)
    return replace(call, mask=torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias)


def with_mask(args: Any, kwargs: dict[str, Any], mask: torch.Tensor) -> tuple[Any, dict[str, Any]]:
    """The arguments of optimized_attention with another mask."""
    at = NAMES.index("mask")
    if len(args) <= at:
        return args, {**kwargs, "mask": mask}
    return (*args[:at], mask, *args[at + 1 :]), kwargs


def served(forward, call: AttentionCall, pack: Callable, earlier: Callable | None) -> Callable | None:
    """On a GPU the dense call, not yet biased, without a mask of queries and keys; None where another pack's override or a
    mask of the model's own has to be heeded, or torch does as well."""
    crowded = len(forward.extra_keys) >= MOST
    if earlier is not None or call.q.device.type != "cuda" or call.mask is not None or crowded:
        return None
    own = call.k.shape[2] - count(forward, call.q.shape[2], call.k.shape[2])
    ends = list(accumulate([own, *(e.tokens for e in forward.extra_keys)]))
    bias = torch.tensor([[0.0, *(e.bias for e in forward.extra_keys)]], device=call.q.device).expand(len(call.q), -1)
    compute = functools.partial(segment_bias, call.q, call.k, call.v, ends, bias, call.scale)
    return lambda: pack(compute())
