"""Forecast: a weighted sum of stored features, y = s F_0 + sum_{i>=1} w_i (F_i - F_0) with s = sum_i w_i.

This one operation evaluates every extrapolation of the cache methods, because each is linear in the raw features and
its weights are scalars that the host knows (`methods/cache/taylor.py`): reuse, Taylor differences (TaylorSeer, arXiv
2503.06923, section 3), Newton's divided differences; and the linear combinations of multistep samplers.

The sum is anchored at F_0 instead of being written sum_i w_i F_i. Both are equal in exact arithmetic, but the weights
of an extrapolation are large, of both signs, and sum to 1: anchored, s is exactly 1, neighbouring features are
subtracted first (almost without rounding) and only their small difference is amplified. One feature with weight 1 is
copied bit for bit, and so is a feature that never changes.

Bandwidth bound: each feature is read once, the result written once. A launch takes up to MOST features; more are added
to an fp32 sum, launch after launch, each of which reads the anchor again. Nothing is formed in the low storage
precision.
"""

import logging
import math
from collections.abc import Sequence

import torch

from .._triton import on_gpu, tl, triton

BLOCK = 1024  # elements a program; 4 warps then load 16 bytes of bf16 a thread from each feature
MOST = 8  # features that one launch reads, the anchor among them: order 4 needs five
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
def _forecast_kernel(
    OUT, SUM, A, B, C, D, E, F, G, H, total, w_b, w_c, w_d, w_e, w_f, w_g, w_h, n,
    COUNT: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """OUT = total A + w_b (B - A) + .. over COUNT features. ADD: the differences are added to SUM, fp32, instead of to
    total A; SUM may be OUT."""
    start = tl.program_id(0).to(tl.int64) * BLOCK  # the tensors may hold more than 2^31 elements
    i = tl.arange(0, BLOCK)
    mask = i < n - start
    anchor = tl.load(A + start + i, mask, 0.0).to(tl.float32)
    y = tl.load(SUM + start + i, mask, 0.0) if ADD else total * anchor
    if COUNT > 1:
        y += w_b * (tl.load(B + start + i, mask, 0.0).to(tl.float32) - anchor)
    if COUNT > 2:
        y += w_c * (tl.load(C + start + i, mask, 0.0).to(tl.float32) - anchor)
    if COUNT > 3:
        y += w_d * (tl.load(D + start + i, mask, 0.0).to(tl.float32) - anchor)
    if COUNT > 4:
        y += w_e * (tl.load(E + start + i, mask, 0.0).to(tl.float32) - anchor)
    if COUNT > 5:
        y += w_f * (tl.load(F + start + i, mask, 0.0).to(tl.float32) - anchor)
    if COUNT > 6:
        y += w_g * (tl.load(G + start + i, mask, 0.0).to(tl.float32) - anchor)
    if COUNT > 7:
        y += w_h * (tl.load(H + start + i, mask, 0.0).to(tl.float32) - anchor)
    tl.store(OUT + start + i, y.to(OUT.dtype.element_ty), mask)


forecast = torch.library.custom_op("tessera::forecast", reference, mutates_args=())
forecast.register_fake(
    lambda features, weights, dtype: torch.empty(features[0].shape, dtype=dtype, device=features[0].device)
)


@on_gpu(forecast)
def launch(features: Sequence[torch.Tensor], weights: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """As reference, which serves fp64."""
    first = _check(features, weights)
    if first.dtype == torch.float64 or dtype == torch.float64:
        logging.getLogger("tessera").debug("forecast: reference serves %s to %s", first.dtype, dtype)
        return reference(features, weights, dtype)
    out = torch.empty(first.shape, dtype=dtype, device=first.device)
    if not out.numel():
        return out
    anchor, total, parts = first.contiguous(), math.fsum(weights), _parts(len(features))
    held = out if dtype == torch.float32 or len(parts) == 1 else torch.empty_like(out, dtype=torch.float32)
    for part in parts:
        rows = [anchor, *(feature.contiguous() for feature in features[part])]
        spare = MOST - len(rows)  # never read: COUNT compiles their loads out
        _forecast_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            out if part is parts[-1] else held, held, *rows, *[anchor] * spare,
            total, *weights[part], *[0.0] * spare, out.numel(),
            COUNT=len(rows), ADD=part is not parts[0], BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out


def _parts(count: int) -> list[slice]:
    """Which features besides the anchor each launch takes."""
    return [slice(start, min(start + MOST - 1, count)) for start in range(1, max(count, 2), MOST - 1)]


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """An order 2 forecast of one block output of FLUX width [1, tokens, 3072], three steps past the newest."""
    first = torch.randn(1, tokens, 3072, device=device)
    features = [(first + 0.1 * i * torch.randn_like(first)).to(dtype) for i in range(3)]
    return features, [2.08, -1.56, 0.48], dtype


def aot_specs() -> list[dict]:
    """What ahead-of-time compilation checks: every number of features, bf16 and fp32 stored for a bf16 model, and the
    last launch of several."""
    scalars = dict.fromkeys(["total", *(f"w_{x}" for x in "bcdefgh")], "fp32") | {"n": "i32"}
    asked = [("bf16", count, False) for count in range(1, MOST + 1)]
    asked += [("fp32", 2, False), ("fp32", MOST, False), ("bf16", 2, True), ("bf16", MOST, True)]
    specs = []
    for stored, count, add in asked:
        args = {"OUT": "*bf16", "SUM": "*fp32", **dict.fromkeys("ABCDEFGH", f"*{stored}"), **scalars}
        const = {"COUNT": count, "ADD": add, "BLOCK": BLOCK}
        extra = (stored, count, add) not in (("bf16", 2, False), ("bf16", MOST, True))
        spec = {"kernel": "_forecast_kernel", "extra": extra, "args": args, "const": const, "warps": 4, "stages": 3}
        tag = f"{stored} x{count}{' added' if add else ''}"
        specs.append(spec | {"tag": tag, "per_target": {}, "expect": {}})
    return specs
