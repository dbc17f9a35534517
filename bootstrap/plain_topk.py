"""Plain top-k block-sparse attention, the baseline that the attention nodes are measured against (attention_quality.py).

Image tokens are cut into blocks as they stand, row by row. Each block of queries sees the `keep` key blocks whose mean
key has the largest product with its mean query, and every token that is not of the image; those tokens see all. Softmax
runs over what is seen: no linear branch, no averages of the rest, no windows, no order of the tokens."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from pack import load_pack

load_pack()

from torch.nn.functional import scaled_dot_product_attention as sdpa

from tessera.methods.attention.call import Answer, AttentionCall, Decline

BLOCK = 16  # tokens: a row of the digit image, a frame of the digit clip


def blocks_of(tokens: int, block: int = BLOCK) -> int:
    """ValueError where blocks do not divide the image: then a count of blocks would not tell the pairs."""
    if tokens % block:
        raise ValueError(f"Plain top-k needs image tokens that are a multiple of {block}, got {tokens}.")
    return tokens // block


def pairs(tokens: int, others: int, keep: int, block: int = BLOCK) -> int:
    """Query-key pairs of one head: image tokens see `keep` blocks and the others, the others see all."""
    return tokens * (min(keep, blocks_of(tokens, block)) * block + others) + others * (tokens + others)


def keep_for(share: float, tokens: int, others: int, block: int = BLOCK) -> int:
    """The fewest key blocks whose pairs are at least this share of dense attention's; all where no fewer are."""
    count = blocks_of(tokens, block)
    enough = (share - 1e-9) * (tokens + others) ** 2
    return next((keep for keep in range(1, count) if pairs(tokens, others, keep, block) >= enough), count)


def seen(q: torch.Tensor, k: torch.Tensor, image: slice, keep: int, block: int = BLOCK) -> torch.Tensor:
    """q, k [B, H, N, D] -> bool [B, H, N, N], the pairs that are left."""
    tokens = image.stop - image.start
    count = blocks_of(tokens, block)
    mean_q, mean_k = (x[:, :, image].unflatten(2, (count, block)).mean(3) for x in (q, k))
    best = (mean_q @ mean_k.transpose(2, 3)).topk(min(keep, count), -1).indices
    chosen = torch.zeros(*q.shape[:2], count, count, dtype=torch.bool, device=q.device).scatter_(3, best, True)
    left = torch.ones(*q.shape[:2], q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    left[:, :, image, image] = chosen.repeat_interleave(block, 2).repeat_interleave(block, 3)
    return left


@dataclass(frozen=True)
class PlainTopK:
    """An override of attention in the form that the dispatcher takes, so that both sides' pairs are counted by the same
    report. keep >= 1."""

    keep: int
    block: int = BLOCK

    def begin(self) -> None:
        return None

    def attend(self, state: Any, call: AttentionCall) -> Answer:
        layout = call.places()
        if call.mask is not None or call.k.shape[1] != call.q.shape[1]:
            raise Decline("plain top-k is for calls without a mask and without grouped heads")
        left = seen(call.q, call.k, layout.image, self.keep, self.block)
        out = sdpa(call.q, call.k, call.v, left, scale=call.scale)
        heads, tokens = call.q.shape[0] * call.q.shape[1], math.prod(layout.grid)
        computed = pairs(tokens, layout.others, self.keep, self.block)
        return Answer(out, heads * float(computed), heads * float(layout.total**2))
