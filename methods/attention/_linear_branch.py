"""The linear branch of Sparse-Linear Attention: over all keys, or per query block over the key blocks left to it."""

import torch
import torch.nn.functional as F

from ...kernels.linear.linear_attention import linear_attention

FEATURE_MAPS = ("softmax", "elu1", "relu")
EPS = 1e-5  # of the official code's form over all keys; the paper's has none
STATE_BYTES = 256 << 20  # of the sums of key blocks and of query blocks held at once


def features(x: torch.Tensor, feature_map: str) -> torch.Tensor:
    """phi(x), at least fp32."""
    x = x if x.dtype == torch.float64 else x.float()
    return {"softmax": lambda: x.softmax(-1), "elu1": lambda: F.elu(x) + 1, "relu": x.relu}[feature_map]()


def linear_all(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weight: torch.Tensor | None, feature_map: str
) -> torch.Tensor:
    """phi(q) S / (phi(q) z + eps) over all keys. q [B, H, Nq, D]; k, v [B, Hkv, Nk, D]; weight [B, Nk] or None, the
    logarithm of how much a key counts. -> [B, H, Nq, D]."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    if weight is None:
        return linear_attention(q, k, v, None, None, feature_map, "sum", EPS)[0]
    of_keys = features(k, feature_map) * weight.exp()[:, None, :, None]
    of_queries = features(q, feature_map)
    out = linear_attention(of_queries, of_keys, v.to(of_keys.dtype), None, None, "identity", "sum", EPS)[0]
    return out.to(q.dtype)


def linear_rest(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor | None,
    rest: torch.Tensor,
    block: tuple[int, int],
    feature_map: str,
) -> torch.Tensor:
    """phi(q) S_i / (phi(q) z_i), with sums over the key blocks that row i of rest names. q [B, H, Nq, D]; k, v
    [B, Hkv, Nk, D] and weight as in linear_all; rest bool [B, H, nQ, nK]. -> [B, H, Nq, D], 0 where nothing is left.

    The sums of every key block are formed once; those of all query blocks are one product with the 0/1 matrix, so that
    nothing is subtracted."""
    (batch, heads, nq, d), (kv, nk), e = q.shape, k.shape[1:3], v.shape[3]
    (bq, bk), (rows, columns), group = block, rest.shape[2:], heads // kv
    out = torch.empty_like(q)
    step = max(1, STATE_BYTES // (4 * (columns + group * rows) * d * (e + 1)))
    for b in range(batch):
        factor = None if weight is None else weight[b].exp()[:, None]
        for first in range(0, kv, step):
            own, mine = slice(first, first + step), slice(first * group, (first + step) * group)
            f = features(k[b, own], feature_map)
            f = f if factor is None else f * factor
            short = columns * bk - nk
            f, x = (F.pad(t, (0, 0, 0, short)).unflatten(1, (columns, bk)) for t in (f, v[b, own].to(f.dtype)))
            sums = torch.cat([f.transpose(2, 3) @ x, f.sum(2)[..., None]], -1).flatten(2)  # [Hkv, nK, D (E + 1)]
            chosen = rest[b, mine].to(f.dtype).unflatten(0, (-1, group)).flatten(1, 2)  # [Hkv, group nQ, nK]
            states = (chosen @ sums).view(-1, rows, d, e + 1)  # [H, nQ, D, E + 1]
            of_queries = F.pad(features(q[b, mine], feature_map), (0, 0, 0, rows * bq - nq)).unflatten(1, (rows, bq))
            got = (of_queries @ states).flatten(1, 2)[:, :nq]
            total = got[..., e:]
            share = torch.where(total == 0, 0, 1 / torch.where(total == 0, 1, total))
            out[b, mine] = (got[..., :e] * share).to(out.dtype)
    return out
