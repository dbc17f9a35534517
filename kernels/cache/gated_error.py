"""How far a forecast is from what was computed, sample by sample: sum |y - b| and sum |b|, where y is the weighted sum of
stored features as in forecast.py. The confidence gate of arXiv 2508.02240 divides the two.

The forecast is never written: one pass reads each feature and b once, where forecasting first would write y and read it
again. Each program leaves one pair of partial sums and a second program adds those of a sample in their order, so the
same inputs give the same bits. The answer stays on the device: two numbers a sample, for one read a step.
"""

import logging
import math
from collections.abc import Sequence

import torch

from .._triton import on_gpu, tl, triton
from .forecast import MOST
from .forecast import _check as _check_features

BLOCK = 1024  # elements of one load
STEPS = 16  # loads of one program
CPU_CHUNK = 1 << 16  # elements; a chunk's fp32 copies stay in the L2 cache
GPU_CHUNK = 1 << 24  # bounds the fp32 copies where the reference serves a GPU


def _check(features: Sequence[torch.Tensor], weights: Sequence[float], b: torch.Tensor) -> None:
    first = _check_features(features, weights)
    if b.shape != first.shape or b.device != first.device:
        raise ValueError(
            f"A forecast and what was computed must have one shape and device, got {[*first.shape]} on {first.device} "
            f"and {[*b.shape]} on {b.device}; forget the history when the size changes."
        )
    if not b.is_floating_point() or b.ndim < 1 or b.numel() == 0:
        raise ValueError(f"What was computed must be floating point and not empty, got {b.dtype}, {[*b.shape]}.")


def reference(features: Sequence[torch.Tensor], weights: Sequence[float], b: torch.Tensor) -> torch.Tensor:
    """features: L tensors [B, ...], any strides, newest (the anchor) first; weights: L floats; b [B, ...].

    Returns [B, 2]: sum |sum_i w_i F_i - b| and sum |b| of each sample, fp32, or fp64 where a feature and b are fp64.
    Raises ValueError when counts, shapes or devices differ.
    """
    _check(features, weights, b)
    exact = torch.float64 if features[0].dtype == b.dtype == torch.float64 else torch.float32
    total, count = math.fsum(weights), b.shape[0]
    rows = [feature.reshape(count, -1) for feature in features]
    wanted = b.reshape(count, -1)
    step = max(1, (CPU_CHUNK if b.device.type == "cpu" else GPU_CHUNK) // count)
    parts = []
    for start in range(0, wanted.shape[1], step):
        part = slice(start, start + step)
        anchor, size = rows[0][:, part].to(exact), wanted[:, part].to(exact)
        y = anchor * total
        for row, weight in zip(rows[1:], weights[1:], strict=True):
            y.add_(row[:, part].to(exact).sub(anchor), alpha=weight)
        parts.append(torch.stack((y.sub_(size).abs().sum(1), size.abs().sum(1)), 1))
    return torch.stack(parts).sum(0)


@triton.jit
def gated_parts(
    PART, TRUTH, A, B, C, D, E, F, G, H, total, w_b, w_c, w_d, w_e, w_f, w_g, w_h, n,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """PART [samples, P, 2]: sum |y - TRUTH| and sum |TRUTH| over this program's BLOCK x STEPS of a sample's n elements."""
    program, sample = tl.program_id(0), tl.program_id(1)
    first = program.to(tl.int64) * (BLOCK * STEPS)  # within the sample
    start = sample.to(tl.int64) * n + first  # the tensors may hold more than 2^31 elements
    i = tl.arange(0, BLOCK)
    change = tl.zeros([BLOCK], tl.float32)
    size = tl.zeros([BLOCK], tl.float32)
    for step in tl.range(0, STEPS):
        mask = i < n - first - step * BLOCK
        at = start + step * BLOCK + i
        anchor = tl.load(A + at, mask, 0.0).to(tl.float32)
        y = total * anchor
        if COUNT > 1:
            y += w_b * (tl.load(B + at, mask, 0.0).to(tl.float32) - anchor)
        if COUNT > 2:
            y += w_c * (tl.load(C + at, mask, 0.0).to(tl.float32) - anchor)
        if COUNT > 3:
            y += w_d * (tl.load(D + at, mask, 0.0).to(tl.float32) - anchor)
        if COUNT > 4:
            y += w_e * (tl.load(E + at, mask, 0.0).to(tl.float32) - anchor)
        if COUNT > 5:
            y += w_f * (tl.load(F + at, mask, 0.0).to(tl.float32) - anchor)
        if COUNT > 6:
            y += w_g * (tl.load(G + at, mask, 0.0).to(tl.float32) - anchor)
        if COUNT > 7:
            y += w_h * (tl.load(H + at, mask, 0.0).to(tl.float32) - anchor)
        truth = tl.load(TRUTH + at, mask, 0.0).to(tl.float32)
        change += tl.abs(y - truth)
        size += tl.abs(truth)
    out = PART + 2 * (sample.to(tl.int64) * tl.num_programs(0) + program)
    tl.store(out, tl.sum(change))
    tl.store(out + 1, tl.sum(size))


@triton.jit
def gated_total(PART, OUT, count, BLOCK: tl.constexpr):
    """OUT [samples, 2] = the sums of PART [samples, count, 2] over its second axis."""
    sample = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    change = tl.zeros([BLOCK], tl.float32)
    size = tl.zeros([BLOCK], tl.float32)
    for step in tl.range(0, (count + BLOCK - 1) // BLOCK):
        mask = i < count - step * BLOCK
        at = PART + 2 * (sample * count + step * BLOCK + i)
        change += tl.load(at, mask, 0.0)
        size += tl.load(at + 1, mask, 0.0)
    tl.store(OUT + 2 * sample, tl.sum(change))
    tl.store(OUT + 2 * sample + 1, tl.sum(size))


gated_error = torch.library.custom_op("tessera::gated_error", reference, mutates_args=())


@gated_error.register_fake
def _fake(features, weights, b):
    exact = torch.float64 if features[0].dtype == b.dtype == torch.float64 else torch.float32
    return b.new_empty((b.shape[0], 2), dtype=exact)


@on_gpu(gated_error)
def launch(features: Sequence[torch.Tensor], weights: Sequence[float], b: torch.Tensor) -> torch.Tensor:
    """As reference, which serves fp64 and more features than one launch reads."""
    if torch.float64 in (features[0].dtype, b.dtype) or len(features) > MOST:
        logging.getLogger("tessera").debug("gated_error: reference serves %d of %s", len(features), b.dtype)
        return reference(features, weights, b)
    _check(features, weights, b)
    rows, truth = [feature.contiguous() for feature in features], b.contiguous()
    samples, spare = b.shape[0], MOST - len(rows)  # never read: COUNT compiles their loads out
    n = b.numel() // samples
    count = triton.cdiv(n, BLOCK * STEPS)
    part = b.new_empty(samples, count, 2, dtype=torch.float32)
    out = b.new_empty(samples, 2, dtype=torch.float32)
    gated_parts[(count, samples)](
        part, truth, *rows, *[rows[0]] * spare, math.fsum(weights), *weights[1:], *[0.0] * spare, n,
        COUNT=len(rows), BLOCK=BLOCK, STEPS=STEPS, num_warps=4,
    )  # fmt: skip
    gated_total[(samples,)](part, out, count, BLOCK=BLOCK, num_warps=4)
    return out


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """An order 1 forecast of the first block of FLUX [1, tokens, 3072], two steps past the newest, and that block."""
    first = torch.randn(1, tokens, 3072, device=device)
    older, newer, now = ((first + 0.1 * i * torch.randn_like(first)).to(dtype) for i in range(3))
    return [newer, older], [3.0, -2.0], now


def aot_specs() -> list[dict]:
    total = {"PART": "*fp32", "OUT": "*fp32", "count": "i32"}
    specs: list[dict] = [
        {"kernel": "gated_total", "args": total, "const": {"BLOCK": BLOCK}, "tag": "", "unaligned": ("count",)}
    ]
    scalars = dict.fromkeys(["total", *(f"w_{x}" for x in "bcdefgh")], "fp32") | {"n": "i32"}
    asked = [("bf16", "bf16", count) for count in range(1, MOST + 1)] + [("fp32", "fp32", 2), ("fp32", "bf16", 2)]
    for stored, truth, count in asked:
        args = {"PART": "*fp32", "TRUTH": f"*{truth}", **dict.fromkeys("ABCDEFGH", f"*{stored}"), **scalars}
        const = {"COUNT": count, "BLOCK": BLOCK, "STEPS": STEPS}
        tag, extra = f"{stored} x{count} of {truth}", (stored, count) != ("bf16", 2)
        specs.append({"kernel": "gated_parts", "args": args, "const": const, "tag": tag, "extra": extra})
    return [spec | {"warps": 4, "stages": 3} for spec in specs]
