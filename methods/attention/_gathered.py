"""The CPU path of plans that name block lists in an order of the tokens: the order is applied while keys are gathered, and
the masks of a small plan are kept."""

from collections.abc import Iterable

import torch

from ...kernels._triton import gathers
from ...kernels.attention.gather import Chunk, Lists, attend, chunks, outputs

HELD_BYTES = 256 << 20  # masks that a plan keeps between calls; larger ones are made anew for each call


def default_block(device: torch.device, tokens: int) -> tuple[int, int]:
    """(queries, keys): the tile of the GPU kernel; on a CPU few keys and many queries, but fewer in a short sequence, so
    that lists follow the pattern closely."""
    if not gathers(device):
        return 128, 64
    return min(128, max(16, 1 << max(1, tokens // 32).bit_length() - 1)), 16


def gathered(
    held: dict[int, list[Chunk]],
    lists: Lists,
    order: torch.Tensor,
    computed: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    key_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, N, D]; k, v [B, Hkv, N, D]; key_bias [B, N] or None. held: chunks of this plan by bytes of a token;
    computed: element pairs of its listed block pairs. -> out like q, lse [B, H, N]."""
    token_bytes = 2 * k.shape[1] * k.shape[3] * k.element_size()
    out, lse = outputs(q)
    for b in range(q.shape[0]):
        parts: Iterable[Chunk] = held.get(token_bytes, ())
        if token_bytes not in held:
            parts = chunks(lists, token_bytes, order)
            if 4 * computed <= HELD_BYTES:
                parts = held[token_bytes] = list(parts)
        weight = None if key_bias is None else key_bias[b].float()
        attend(parts, q[b], k[b], v[b], scale, 1, out[b], lse[b], weight)
    return out, lse
