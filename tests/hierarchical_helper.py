"""Inputs of hierarchical sparse attention, and the same attention written out as one matrix."""

import math

import torch

OPTIONS = [  # enrich, reweight, exclude_selected
    (True, True, False),
    (True, True, True),
    (True, False, False),
    (False, True, False),
]


def sizes_of(tokens, block, levels):
    sizes = [tokens]
    for _ in range(levels):
        sizes.append(math.ceil(sizes[-1] / block))
    return sizes


def make(shape, device, dtype=torch.float32):
    """Token-major q and k, values of other strides; pooled keys are random, lists are ascending with other counts in
    every row, none of them confined to what a parent chose; what stands behind a list must not count."""
    b, h, kv, n, d, block, levels, width = shape
    sizes = sizes_of(n, block, levels)
    q = torch.randn(b, n, h, d, device=device).to(dtype).transpose(1, 2)
    k = torch.randn(b, n, 2, kv, d, device=device).to(dtype)[:, :, 0].transpose(1, 2)
    v, kc = (torch.randn(b, kv, rows, d, device=device).to(dtype) for rows in (n, sum(sizes[1:])))
    vc = torch.randn(b, sum(sizes[1:]), kv, d, device=device).to(dtype).transpose(1, 2)
    idx, cnt = [], []
    for size in sizes[1:]:
        pick = torch.rand(b, h, size, size).argsort(-1)[..., :width].sort(-1).values
        idx.append(torch.nn.functional.pad(pick, (0, width - pick.shape[-1])))
        cnt.append(torch.randint(1, pick.shape[-1] + 1, (b, h, size)))
    lists = torch.cat(idx, 2).int().to(device), torch.cat(cnt, 2).int().to(device)
    return q, k, v, kc, vc, *lists, block, levels


def exact(q, k, v, kc, vc, idx, cnt, block, levels, scale=None, enrich=True, reweight=True, exclude_selected=False):
    """fp64 attention over all tokens and all means side by side, with an explicit [N, N + M] matrix of log-weights."""
    q, k, v, kc, vc = (x.double() for x in (q, k, v, kc, vc))
    (b, h, n, d), group = q.shape, q.shape[1] // k.shape[1]
    sizes, token = sizes_of(n, block, levels), torch.arange(n, device=q.device)
    chosen, row = [], 0  # per level bool [B, H, N_l, N_l]
    for size in sizes[1:]:
        here = torch.zeros(b, h, size, size, dtype=torch.bool, device=q.device)
        for at in torch.cartesian_prod(*(torch.arange(x) for x in (b, h, size))).view(-1, 3).tolist():
            source = (at[0], at[1], row + at[2])
            here[at[0], at[1], at[2], idx[source][: cnt[source]].long()] = True
        chosen.append(here)
        row += size
    parts = []
    for level, size in enumerate(sizes):
        node = torch.arange(size, device=q.device)
        seen = torch.ones(b, h, n, size, dtype=torch.bool, device=q.device)
        if level < levels:
            seen = chosen[level][:, :, token // block ** (level + 1)][:, :, :, node // block]
        weight = torch.zeros(size, dtype=torch.float64, device=q.device)
        if level:
            held = torch.stack([(token // block**level == j).sum() for j in range(size)])
            weight = held.double().log() if reweight else weight
            if exclude_selected:
                seen = seen & ~chosen[level - 1][:, :, token // block**level]
            seen = seen & enrich
        parts.append(torch.where(seen, weight, -math.inf))
    keys, values = (torch.cat(x, 2).repeat_interleave(group, 1) for x in ((k, kc), (v, vc)))
    score = q @ keys.transpose(2, 3) * (d**-0.5 if scale is None else scale) + torch.cat(parts, 3)
    level = score.logsumexp(-1)
    return (score - level.nan_to_num(neginf=0)[..., None]).exp() @ values, level
