"""Softmax attention over keys that lie in a few segments, each with one number added to its logits:

    s_ij = scale q_i . k_j + b_seg(j)        out_i = sum_j e^{s_ij} v_j / sum_j e^{s_ij}

b is one number for each row of the batch and segment: 0 is plain attention, ln of a strength weighs the condition of
EasyControl (arXiv 2503.07027), -inf leaves the segment out, unread. No mask of queries and keys is formed. The last
segments may be kept as e4m3 numbers with one scale for each head of keys and of values: those of a condition that a whole
run reads again. A query that sees nothing gives 0. Gradients are formed in torch on every device; what is appended has none.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .. import _config
from .._triton import on_gpu, triton
from ._dense import SCORES, dense
from ._segment_forward import MOST, segment_forward
from ._tiles import split_head

LARGEST = 448.0  # of e4m3


class Appended(NamedTuple):
    """Keys and values e4m3 [B, Hkv, M8, D], their scales fp32 [B, Hkv]: `segment_bias(..., *appended)`."""

    k8: torch.Tensor
    v8: torch.Tensor
    k_scale: torch.Tensor
    v_scale: torch.Tensor

    @classmethod
    def of(cls, k: torch.Tensor, v: torch.Tensor) -> "Appended":
        """Rounds k, v [B, Hkv, M8, D]; the largest number of each head is the largest that e4m3 has."""
        scales = [x.abs().amax((2, 3)).float() / LARGEST for x in (k, v)]
        rounded = [
            (x.float() / torch.where(scale == 0, 1.0, scale)[..., None, None]).to(torch.float8_e4m3fn)
            for x, scale in zip((k, v), scales, strict=True)
        ]
        return cls(*rounded, *scales)


def _check(q, k, v, ends, bias, k8, v8, k_scale, v_scale) -> None:
    if (
        not q.ndim == k.ndim == v.ndim == 4
        or k.shape != v.shape
        or k.shape[0] != q.shape[0]
        or k.shape[3] != q.shape[3]
    ):
        raise ValueError(
            f"Queries {[*q.shape]} do not fit keys {[*k.shape]} and values {[*v.shape]}: [B, H, N, D] each."
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} heads of queries are no multiple of the {k.shape[1]} heads of keys.")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"Queries, keys and values need one float dtype, got {q.dtype}, {k.dtype}, {v.dtype}.")
    (b, kv, m, d), eight = k.shape, k8 is not None
    if [x is not None for x in (k8, v8, k_scale, v_scale)] != [eight] * 4:
        raise ValueError("Appended keys need all of k8, v8, k_scale and v_scale.")
    if eight:
        wrong = k8.ndim != 4 or k8.shape != v8.shape or (*k8.shape[:2], k8.shape[3]) != (b, kv, d)
        if wrong or not k8.dtype == v8.dtype == torch.float8_e4m3fn:
            raise ValueError(
                f"Appended keys {[*k8.shape]} {k8.dtype} and values {[*v8.shape]} {v8.dtype} must be e4m3 "
                f"{[b, kv, 'M', d]}."
            )
        for scale in (k_scale, v_scale):
            if tuple(scale.shape) != (b, kv) or scale.dtype != torch.float32:
                raise ValueError(f"Scales of appended keys {[*scale.shape]} {scale.dtype} must be fp32 {[b, kv]}.")
    total = m + (k8.shape[2] if eight else 0)
    if not 0 < len(ends) <= MOST or [*ends] != sorted(ends) or ends[0] < 0 or ends[-1] != total:
        raise ValueError(f"Segments end at {[*ends]}: 1 to {MOST} ascending numbers, the last one {total} keys.")
    if eight and m and m not in ends:
        raise ValueError(f"Segments end at {[*ends]}: one must end at {m}, where the appended keys begin.")
    if tuple(bias.shape) != (b, len(ends)) or bias.dtype != torch.float32:
        raise ValueError(f"The bias {[*bias.shape]} {bias.dtype} must be fp32 {[b, len(ends)]}, one for each segment.")


def _own(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Queries [B, H, N, D] -> [B, Hkv, H / Hkv N, D], those that share a head of keys one after another."""
    return q if q.shape[1] == k.shape[1] else q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)


def _decoded(x8: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (x8.to(torch.promote_types(dtype, torch.float32)) * scale[..., None, None]).to(dtype)


def _columns(at, segments: list[tuple[int, int]], k, v, k8, v8, k_scale, v_scale) -> list[torch.Tensor]:
    """Keys and values of some rows and segments; neighbouring segments are one view, a single run no copy."""
    m, runs = k.shape[2], list[tuple[int, int]]()
    for start, stop in segments:
        if runs and runs[-1][1] == start and start != m:
            runs[-1] = runs[-1][0], stop
        else:
            runs.append((start, stop))
    found = []
    for x, x8, scale in ((k, k8, k_scale), (v, v8, v_scale)):
        parts = [
            x[at, :, start:stop] if stop <= m else _decoded(x8[at, :, start - m : stop - m], scale[at], x.dtype)
            for start, stop in runs
        ]
        found.append(parts[0] if len(parts) == 1 else torch.cat(parts, 2))
    return found


def _groups(bias: torch.Tensor) -> Iterator[tuple[slice | list[int], list[bool]]]:
    """Rows of the batch that leave out the same segments, and which segments they see."""
    seen = (~bias.isneginf()).tolist()
    if seen and seen.count(seen[0]) == len(seen):
        yield slice(None), seen[0]
        return
    for kinds in {tuple(row): row for row in seen}.values():
        yield [i for i, row in enumerate(seen) if row == kinds], kinds


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ends: list[int],
    bias: torch.Tensor,
    scale: float | None = None,
    k8: torch.Tensor | None = None,
    v8: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [B, H, N, D]; k, v [B, Hkv, M, D] with H a multiple of Hkv; any strides, one float dtype. k8, v8, k_scale,
    v_scale: an Appended, whose keys follow those of k. ends: where each of up to 9 segments ends, ascending, the last one
    the number of all keys, and M one of them where keys are appended. bias fp32 [B, segments], natural logarithm.

    -> [B, H, N, D] in token-major memory. Softmax in fp32 (fp64 for fp64). Raises ValueError when sizes do not fit."""
    appended = k8, v8, k_scale, v_scale
    _check(q, k, v, ends, bias, *appended)
    (b, h, n, d), scale = q.shape, q.shape[3] ** -0.5 if scale is None else scale
    bounds = [*zip([0, *ends], ends, strict=False)]
    out = None
    for at, seen in _groups(bias):
        kept = [i for i, (start, stop) in enumerate(bounds) if seen[i] and stop > start]
        if not kept or not n:
            continue
        mask, lengths = None, [bounds[i][1] - bounds[i][0] for i in kept]
        if bias[at][:, kept].any():
            mask = bias[at][:, kept].repeat_interleave(torch.tensor(lengths, device=q.device), 1)[:, None, None]
        keys, values = _columns(at, [bounds[i] for i in kept], k, v, *appended)
        got = dense(_own(q[at], k), keys, values, mask, scale)[0]
        got = got.unflatten(2, (-1, n)).flatten(1, 2) if h != k.shape[1] else got
        if isinstance(at, slice):
            return got.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        out = q.new_zeros(b, n, h, d) if out is None else out
        out[at] = got.to(q.dtype).transpose(1, 2)
    return (q.new_zeros(b, n, h, d) if out is None else out).transpose(1, 2)


segment_bias = torch.library.custom_op("tessera::segment_bias", reference, mutates_args=())


@segment_bias.register_fake
def _fake(q, *_, **__):
    b, h, n, d = q.shape
    return q.new_empty(b, n, h, d).transpose(1, 2)


@on_gpu(segment_bias)
def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ends: list[int],
    bias: torch.Tensor,
    scale: float | None = None,
    k8: torch.Tensor | None = None,
    v8: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """As reference, which serves fp64 and heads above 256. The values of bias are not read here. Beside fp32 the
    appended keys are decoded first: their registers would spill."""
    (b, h, n, d), kv = q.shape, k.shape[1]
    if q.dtype == torch.float64 or d > 256:
        return reference(q, k, v, ends, bias, scale, k8, v8, k_scale, v_scale)
    _check(q, k, v, ends, bias, k8, v8, k_scale, v_scale)
    out = q.new_empty(b, n, h, d).transpose(1, 2)
    beside = [x for x in (k8, v8, k_scale, v_scale) if x is not None]
    if beside and q.dtype == torch.float32:
        k, v = (torch.cat((x, _decoded(beside[i], beside[i + 2], x.dtype)), 2) for i, x in enumerate((k, v)))
        beside = []
    eight = bool(beside)
    q, k, v, *bits = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v, *beside[:2]))
    bits = [x.view(torch.uint8) for x in bits] or [k, v]
    scales = [x.contiguous() for x in beside[2:]] or [bias, bias]
    m, count = k.shape[2], len(ends)
    first = sum(end <= m for end in ends) if eight else count
    d0, d1 = split_head(d, 8 * q.element_size())
    tuned = _config.lookup("segment_bias_fp8" if eight else "segment_bias", q, d0 + d1)
    bm, bn = tuned["tile"]
    if out.numel():
        segment_forward[(triton.cdiv(n, bm), h, b)](
            q, k, v, out, bias.contiguous(), *bits, *scales, d**-0.5 if scale is None else scale,
            n, count, first, m, kv, *ends, *[ends[-1]] * (MOST - count),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *bits[0].stride()[:3],
            *bits[1].stride()[:3], D=d, D0=d0, D1=d1, BM=bm, BN=bn, GROUP=h // kv, EIGHT=eight,
            num_warps=tuned["warps"], num_stages=tuned["stages"],
        )  # fmt: skip
    return out


def backward_reference(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ends: list[int],
    bias: torch.Tensor,
    scale: float,
    k8: torch.Tensor | None,
    v8: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and bias, over so many queries at once that their scores fit in memory."""
    exact = torch.promote_types(q.dtype, torch.float32)
    bounds = [*zip([0, *ends], ends, strict=False)]
    keys, values = (
        x.to(exact)
        for x in _columns(slice(None), [b for b in bounds if b[1] > b[0]] or [(0, 0)], k, v, k8, v8, k_scale, v_scale)
    )
    lengths = torch.tensor([stop - start for start, stop in bounds], device=q.device)
    added = bias.to(exact).repeat_interleave(lengths, 1)[:, None, None]
    (b, h, n, d), m = q.shape, k.shape[2]
    dq, dkeys, dvalues = torch.empty_like(q, dtype=exact), torch.zeros_like(keys), torch.zeros_like(values)
    of_columns = added.new_zeros(b, added.shape[3])
    step = max(1, SCORES // max(1, 4 * b * h * keys.shape[2]))
    for start in range(0, n, step):
        at = slice(start, start + step)
        rows, of_out = (_own(x[:, :, at].to(exact), k) for x in (q, grad))
        share = (rows @ keys.transpose(2, 3) * scale + added).softmax(-1).nan_to_num(0.0)  # nothing seen: 0 / 0
        dvalues += share.transpose(2, 3) @ of_out
        slope = of_out @ values.transpose(2, 3)
        slope = share * (slope - (share * slope).sum(-1, keepdim=True))
        of_columns += slope.sum((1, 2))
        dkeys += (slope.transpose(2, 3) @ rows).mul_(scale)
        dq[:, :, at] = (slope @ keys).mul_(scale).view(b, h, -1, d)
    dbias = torch.stack([of_columns[:, start:stop].sum(1) for start, stop in bounds], 1).to(bias.dtype)
    dq, dk, dv = (x.to(q.dtype).contiguous() for x in (dq, dkeys[:, :, :m], dvalues[:, :, :m]))
    return dq, dk, dv, dbias


segment_bias_backward = torch.library.custom_op("tessera::segment_bias_backward", backward_reference, mutates_args=())
segment_bias_backward.register_fake(
    lambda grad, q, k, v, ends, bias, *_: tuple(x.new_empty(x.shape) for x in (q, k, v, bias))
)


def _save(ctx, inputs, output) -> None:
    q, k, v, ctx.ends, bias, scale, *appended = inputs
    ctx.scale = q.shape[3] ** -0.5 if scale is None else scale
    ctx.save_for_backward(q, k, v, bias, *appended)


def _gradients(ctx, grad):
    q, k, v, bias, *appended = ctx.saved_tensors
    dq, dk, dv, dbias = segment_bias_backward(grad, q, k, v, ctx.ends, bias, ctx.scale, *appended)
    return dq, dk, dv, None, dbias, *(None,) * 5


segment_bias.register_autograd(_gradients, setup_context=_save)


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """Text and picture, a condition of 1024 tokens at strength 0.7, and one that is left out."""
    sizes = (tokens, tokens + 2048, tokens + 2048)
    q, k, v = (torch.randn(1, n, 8, 128, device=device).to(dtype).transpose(1, 2) for n in sizes)
    bias = torch.tensor([[0.0, math.log(0.7), -math.inf]], device=device)
    return q, k, v, [tokens, tokens + 1024, tokens + 2048], bias
