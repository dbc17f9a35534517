"""Sparse-Linear Attention written down from its definition, with explicit masks over all pairs, and calls to try it on."""

import math
from types import SimpleNamespace

import torch
from torch.nn.functional import elu
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tessera.archs import Layout
from tessera.kernels.attention.reorder import compact_order
from tessera.methods.attention.call import AttentionCall
from tessera.methods.attention.sparse_linear_weights import Projections

PHI = {"softmax": lambda x: x.softmax(-1), "elu1": lambda x: elu(x) + 1, "relu": torch.relu}


def layout(grid, before=0, after=0):
    n = math.prod(grid)
    return Layout(grid, slice(before, before + n), before + n + after)


def call_of(case, dtype=torch.float64, mask=None, d=16, scale=0.25):
    grid, before, after, kv = case
    where = layout(grid, before, after)
    q, k, v = (torch.randn(2, n, where.total, d).to(dtype) for n in (4, kv, kv))
    return AttentionCall(q, k, v, mask, scale, "joint", where, SimpleNamespace(number=3), None)


def projections(d=16, number=3):
    return Projections("made.safetensors", {number: (torch.randn(d, d) / d**0.5, torch.randn(d))})


def classes(method, call):
    """(critical, marginal), bool [B, H, N, N] in sequence order, from the definition: pooled scores, one block of
    queries at a time. Text rows and columns are critical."""
    where, (bq, bk) = call.layout, (method.block_q, method.block_k)
    n = where.image.stop - where.image.start
    tokens = torch.arange(where.image.start, where.image.stop)
    if method.order == "tiles":
        tokens = tokens[compact_order(where.grid, (bq, bk))]
    b, h, total, _ = call.q.shape
    k = call.k.repeat_interleave(h // call.k.shape[1], 1)
    columns = list(tokens.split(bk))
    if total > n and n % bk:
        columns = columns[:-1]
    keep = max(1, int(method.topk * len(columns)))
    dropped = min(len(columns) - keep, int(method.negligible * len(columns)))
    critical = torch.ones(b, h, total, total, dtype=torch.bool)
    marginal = ~critical
    for at in range(b):
        for head in range(h):
            for i, rows in enumerate(tokens.split(bq)):
                mean = call.q[at, head, rows].mean(0)
                scores = [float(mean @ k[at, head, c].mean(0)) for c in columns]
                own = {j for j in range(len(columns)) if j * bk < (i + 1) * bq and (j + 1) * bk > i * bq}
                ranks = [math.inf if method.keep_own and j in own else s for j, s in enumerate(scores)]
                best = sorted(range(len(columns)), key=lambda j: (-ranks[j], j))[:keep]
                rest = sorted((j for j in range(len(columns)) if j not in best), key=lambda j: (scores[j], j))
                for j in rest:
                    critical[at, head, rows[:, None], columns[j][None]] = False
                for j in rest[dropped if method.variant == "paper" else 0 :]:
                    marginal[at, head, rows[:, None], columns[j][None]] = True
    return critical, marginal


def explicit(method, call, projection=None):
    critical, marginal = classes(method, call)
    group = call.q.shape[1] // call.k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (call.k, call.v))
    bias = torch.zeros(critical.shape, dtype=call.q.dtype).masked_fill(~critical, -math.inf)
    weight = torch.ones(call.q.shape[0], call.layout.total, dtype=call.q.dtype)
    if call.mask is not None:
        bias = bias + call.key_bias().to(bias)[:, None, None]
        weight = call.key_bias().to(bias).exp()
    out = sdpa(call.q, k, v, bias, scale=call.scale)
    if projection is None:
        return out
    phi = PHI[method.feature_map]
    mass = (phi(call.q) @ phi(k).transpose(2, 3)) * weight[:, None, None]
    if method.variant == "main":
        linear = mass @ v / (mass.sum(-1, keepdim=True) + 1e-5)
    else:
        mass = mass * marginal
        total = mass.sum(-1, keepdim=True)
        linear = torch.where(total == 0, 0, mass @ v / total)
    weight, bias = (x.to(call.q) for x in projection)
    image = call.layout.image
    out[:, :, image] += (linear @ weight.T + bias)[:, :, image]
    return out
