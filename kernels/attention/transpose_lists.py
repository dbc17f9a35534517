"""Transposes block lists: from the key blocks of every query block to the query blocks of every key block.

A gradient with respect to keys sums over the queries that see them, so it walks the lists by key block. The transposed
lists are in compressed rows: the query blocks of key block j are rows[offsets[j] : offsets[j + 1]], ascending. They
come from one stable sort of the listed key blocks per head, so they are the same in every run and cost what the lists
hold; no map of all block pairs is made (the transposition of LLSA, arXiv 2512.16615, without its atomic scatter).

Sorting is what torch does best on every device, so the reference serves the GPU too.
"""

import torch


def reference(idx: torch.Tensor, cnt: torch.Tensor, blocks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """idx int [B or 1, H or 1, nQ, W], key blocks below `blocks`, of which the first cnt int [B or 1, H or 1, nQ]
    count.

    -> offsets int32 [B', H', blocks + 1]; rows int32 [B', H', nQ * W], query blocks; position int32 [B', H', nQ * W],
    where the entry stands in idx.flatten(2), for what else is stored per entry. B' and H' are the larger of the two
    inputs'. Behind offsets[..., -1], rows and position name the entries that do not count. Raises ValueError when the
    inputs do not fit.
    """
    if idx.ndim != 4 or cnt.ndim != 3 or idx.shape[2] != cnt.shape[2]:
        raise ValueError(f"Lists {[*idx.shape]} and counts {[*cnt.shape]} must be [B, H, nQ, W] and [B, H, nQ].")
    for a, b in zip(idx.shape[:2], cnt.shape[:2], strict=True):
        if a != b and 1 not in (a, b):
            raise ValueError(f"Lists {[*idx.shape]} and counts {[*cnt.shape]} are for other batches or heads.")
    if idx.shape[2] * idx.shape[3] >= 1 << 31:
        raise ValueError(f"A head's list of {idx.shape[2]} x {idx.shape[3]} entries is too long; use larger blocks.")
    width = idx.shape[3]
    live = torch.arange(width, device=idx.device) < cnt[..., None]
    key = torch.where(live, idx, blocks).to(torch.int32).flatten(2)
    key, position = key.sort(dim=-1, stable=True)
    bounds = torch.arange(blocks + 1, dtype=torch.int32, device=idx.device).expand(*key.shape[:2], -1).contiguous()
    offsets = torch.searchsorted(key, bounds, out_int32=True)
    return offsets, (position // max(1, width)).int(), position.int()


def _fake(idx: torch.Tensor, cnt: torch.Tensor, blocks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lead = [max(a, b) for a, b in zip(idx.shape[:2], cnt.shape[:2], strict=True)]
    offsets = idx.new_empty(*lead, blocks + 1, dtype=torch.int32)
    rows, position = (idx.new_empty(*lead, idx.shape[2] * idx.shape[3], dtype=torch.int32) for _ in range(2))
    return offsets, rows, position


transpose_lists = torch.library.custom_op("tessera::transpose_lists", reference, mutates_args=())
transpose_lists.register_fake(_fake)


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """8 heads, blocks of 64 tokens, a tenth of the key blocks each."""
    blocks = -(-tokens // 64)
    score = torch.rand(1, 8, blocks, blocks, device=device)
    idx = score.topk(max(1, blocks // 10)).indices.sort(-1).values.int()
    return idx, torch.full(idx.shape[:3], idx.shape[3], dtype=torch.int32, device=device), blocks
