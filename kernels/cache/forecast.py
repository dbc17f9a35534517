"""Forecast: a weighted sum of stored features, y = s F_0 + sum_{i>=1} w_i (F_i - F_0) with s = sum_i w_i.

This one operation evaluates every extrapolation of the cache methods, because each is linear in the raw features and
its weights are scalars that the host knows (`methods/cache/taylor.py`): reuse, Taylor differences (TaylorSeer, arXiv
2503.06923, section 3), Newton's divided differences; and the linear combinations of multistep samplers.

The sum is anchored at F_0 instead of being written sum_i w_i F_i. Both are equal in exact arithmetic, but the weights
of an extrapolation are large, of both signs, and sum to 1: anchored, s is exactly 1, neighbouring features are
subtracted first (almost without rounding) and only their small difference is amplified. One feature with weight 1 is
copied bit for bit, and so is a feature that never changes.

Bandwidth bound: each feature is read once, the result written once. Nothing is formed in the low storage precision.
"""

import logging
import math
from collections.abc import Sequence

import torch

from .._triton import on_gpu, tl, triton

BLOCK = 1024  # elements a program; 4 warps then load 16 bytes of bf16 a thread from each feature
MOST = 5  # features the kernel takes: order 4 needs five
CPU_CHUNK = 1 << 16  # elements; a chunk's fp32 copies stay in the L2 cache
GPU_CHUNK = 1 << 24  # bounds the fp32 copies where the reference serves a GPU


def _check(features: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    if not features or len(features) != len(weights):
        raise ValueError(f"forecast needs one weight a feature, got {len(features)} features, {len(weights)} weights.")
    first = features[0]
    for other in features[1:]:
        if (other.shape, other.dtype, other.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"forecast needs features of one shape, dtype and device, got {list(other.shape)} {other.dtype} on "
                f"{other.device} beside {list(first.shape)} {first.dtype} on {first.device}; reset the history first."
            )
    if not first.is_floating_point():
        raise ValueError(f"forecast needs a floating point dtype, got {first.dtype}; convert the features first.")
    return first


def reference(features: Sequence[torch.Tensor], weights: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """Weighted sum of features: L tensors of one shape [...], any strides, newest (the anchor) first; weights: L floats.

    Returns a new contiguous tensor [...] of `dtype`, never a view of a feature. Accumulates in fp32, fp64 in fp64.
    Raises ValueError when counts, shapes, dtypes or devices of the inputs differ.
    """
    first = _check(features, weights)
    exact = torch.float64 if first.dtype == torch.float64 else torch.float32
    total = math.fsum(weights)
    rows = [feature.reshape(-1) for feature in features]
    out = torch.empty(first.shape, dtype=dtype, device=first.device)
    flat = out.view(-1)
    chunk = CPU_CHUNK if first.device.type == "cpu" else GPU_CHUNK
    for start in range(0, flat.numel(), chunk):
        part = slice(start, start + chunk)
        anchor = rows[0][part].to(exact)
        y = anchor * total
        for row, weight in zip(rows[1:], weights[1:], strict=True):
            y.add_(row[part].to(exact).sub(anchor), alpha=weight)
        flat[part] = y
    return out


@triton.jit
def _forecast_kernel(OUT, A, B, C, D, E, total, w_b, w_c, w_d, w_e, n, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK  # the tensors may hold more than 2^31 elements
    i = tl.arange(0, BLOCK)
    mask = i < n - start
    anchor = tl.load(A + start + i, mask, 0.0).to(tl.float32)
    y = total * anchor
    if COUNT > 1:
        y += w_b * (tl.load(B + start + i, mask, 0.0).to(tl.float32) - anchor)
    if COUNT > 2:
        y += w_c * (tl.load(C + start + i, mask, 0.0).to(tl.float32) - anchor)
    if COUNT > 3:
        y += w_d * (tl.load(D + start + i, mask, 0.0).to(tl.float32) - anchor)
    if COUNT > 4:
        y += w_e * (tl.load(E + start + i, mask, 0.0).to(tl.float32) - anchor)
    tl.store(OUT + start + i, y.to(OUT.dtype.element_ty), mask)


forecast = torch.library.custom_op("tessera::forecast", reference, mutates_args=())
forecast.register_fake(
    lambda features, weights, dtype: torch.empty(features[0].shape, dtype=dtype, device=features[0].device)
)


@on_gpu(forecast)
def launch(features: Sequence[torch.Tensor], weights: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    first = _check(features, weights)
    if first.dtype == torch.float64 or dtype == torch.float64 or len(features) > MOST:
        logging.getLogger("tessera").debug("forecast: reference serves %d features, %s", len(features), first.dtype)
        return reference(features, weights, dtype)
    rows = [feature.contiguous() for feature in features]
    rows += [rows[0]] * (MOST - len(rows))  # never read: COUNT compiles their loads out
    factors = [math.fsum(weights), *weights[1:]] + [0.0] * (MOST - len(weights))
    out = torch.empty(first.shape, dtype=dtype, device=first.device)
    n = out.numel()
    if n:
        _forecast_kernel[(triton.cdiv(n, BLOCK),)](
            out, *rows, *factors, n, COUNT=len(features), BLOCK=BLOCK, num_warps=4
        )
    return out


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """An order 2 forecast of one block output of FLUX width [1, tokens, 3072], three steps past the newest."""
    first = torch.randn(1, tokens, 3072, device=device)
    features = [(first + 0.1 * i * torch.randn_like(first)).to(dtype) for i in range(3)]
    return features, [2.08, -1.56, 0.48], dtype


def aot_specs() -> list[dict]:
    """What ahead-of-time compilation checks: every number of features, bf16, and fp32 stored for a bf16 model."""
    scalars = {"total": "fp32", "w_b": "fp32", "w_c": "fp32", "w_d": "fp32", "w_e": "fp32", "n": "i32"}
    specs = []
    for stored, count in [("bf16", count) for count in range(1, MOST + 1)] + [("fp32", 2), ("fp32", MOST)]:
        args = {"OUT": "*bf16", **dict.fromkeys("ABCDE", f"*{stored}"), **scalars}
        const = {"COUNT": count, "BLOCK": BLOCK}
        extra = (stored, count) not in (("bf16", 2), ("fp32", MOST))
        spec = {"kernel": "_forecast_kernel", "extra": extra, "args": args, "const": const, "warps": 4, "stages": 3}
        specs.append(spec | {"tag": f"{stored} x{count}", "per_target": {}, "expect": {}})
    return specs
