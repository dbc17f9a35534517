"""Convolution over time, K x 1, that mixes channels: the temporal step of SANA-Video's feed-forward.

    out[t, s] = b + sum_k W_k x[t + k - K // 2, s]

over frames t and positions s (arXiv 2509.24695, section 3.2: K = 3, no bias). Frames before the first are those of the
cache, or zeros; frames after the last are zeros. So a clip computed in chunks, each with the last K // 2 frames of the
one before, equals the whole but for the last K // 2 frames of each chunk, which miss their future: that is how its
block-wise sampler runs (section 3.3).

A shift by one frame is a shift by S rows of the tokens [T S, C], so this is one matrix product whose rows are read
K times from shifted places.
"""

import torch

from .. import _config
from .._triton import on_gpu, tl, triton

SIZES = ["ROWS", "FIRST", "N", "S", "CIN", "COUT", "xb", "cb", "yb"]
_jit = triton.jit(do_not_specialize=SIZES) if hasattr(triton, "__version__") else triton.jit


def _check(x, weight, bias, frames, cache) -> None:
    if x.ndim != 3 or frames < 1 or x.shape[1] % frames:
        raise ValueError(f"Tokens {[*x.shape]} do not divide into {frames} frames: [B, T S, C].")
    if weight.ndim != 3 or weight.shape[1] != x.shape[2] or weight.shape[2] % 2 == 0:
        raise ValueError(f"Temporal weight {[*weight.shape]} must be [C out, {x.shape[2]}, K] with odd K.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"Bias {[*bias.shape]} must be [{weight.shape[0]}].")
    before = weight.shape[2] // 2 * (x.shape[1] // frames)
    if cache is not None and cache.shape != (x.shape[0], before, x.shape[2]):
        raise ValueError(
            f"The cache {[*cache.shape]} must hold the last {weight.shape[2] // 2} frames: "
            f"{[x.shape[0], before, x.shape[2]]}."
        )
    given = {t.dtype for t in (x, weight, bias, cache) if t is not None}
    if len(given) > 1 or not x.is_floating_point():
        raise ValueError(f"Tokens, weights and cache need one float dtype, got {sorted(map(str, given))}.")


def _exact(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _window(x, frames, cache, radius) -> torch.Tensor:
    """x with the frames before and after it, [B, (T + 2 radius) S, C] in fp32."""
    side = x.new_zeros(x.shape[0], radius * (x.shape[1] // frames), x.shape[2])
    return _exact(torch.cat((side if cache is None else cache, x, side), 1))


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    frames: int,
    cache: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [B, T S, C], T = frames, any strides; weight [C out, C, K], K odd; bias [C out]; cache [B, (K // 2) S, C], the
    frames before x -> [B, T S, C out]. Accumulates in fp32, fp64 in fp64. Raises ValueError when sizes do not fit."""
    _check(x, weight, bias, frames, cache)
    step, n, w = x.shape[1] // frames, x.shape[1], _exact(weight)
    rows = _window(x, frames, cache, weight.shape[2] // 2)
    y = torch.zeros((), dtype=w.dtype, device=w.device)
    for k in range(weight.shape[2]):
        y = y + rows[:, k * step : k * step + n] @ w[:, :, k].t()
    return (y if bias is None else y + _exact(bias)).to(x.dtype)


@_jit
def shifted_product(
    X, CACHE, WEIGHT, BIAS, Y, ROWS, FIRST, N, S, CIN, COUT, xb, xn, cb, cn, yb, yn, wk, wo, wi,
    K: tl.constexpr, CACHED: tl.constexpr, BIASED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Y[i] = BIAS + sum_k X[FIRST + i + (k - K // 2) S] WEIGHT[k]^T for ROWS rows; rows of X before 0 come from CACHE."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    o = tl.program_id(1) * BN + tl.arange(0, BN)
    batch = tl.program_id(2).to(tl.int64)
    acc = tl.zeros([BM, BN], tl.float32)
    deep = (CIN + BK - 1) // BK
    for step in tl.range(0, K * deep):
        tap, c = step // deep, (step % deep) * BK + tl.arange(0, BK)
        n = FIRST + i + (tap - K // 2) * S
        inside = (c < CIN)[None, :] & (i < ROWS)[:, None]
        at = batch * xb + n.to(tl.int64)[:, None] * xn + c[None, :]
        x = tl.load(X + at, mask=inside & ((n >= 0) & (n < N))[:, None], other=0.0)
        if CACHED:
            old = n + (K // 2) * S
            at = batch * cb + old.to(tl.int64)[:, None] * cn + c[None, :]
            x += tl.load(CACHE + at, mask=inside & ((n < 0) & (old >= 0))[:, None], other=0.0)
        w_at = WEIGHT + tap * wk + o[None, :] * wo + c[:, None] * wi
        w = tl.load(w_at, mask=(o < COUT)[None, :] & (c < CIN)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    if BIASED:
        acc += tl.load(BIAS + o, mask=o < COUT, other=0.0).to(tl.float32)[None, :]
    y_at = Y + batch * yb + i.to(tl.int64)[:, None] * yn + o[None, :]
    tl.store(y_at, acc.to(Y.dtype.element_ty), mask=(i < ROWS)[:, None] & (o < COUT)[None, :])


temporal_conv = torch.library.custom_op("tessera::temporal_conv", reference, mutates_args=())


@temporal_conv.register_fake
def _fake(x, weight, bias, frames, cache=None):
    return x.new_empty(*x.shape[:2], weight.shape[0])


def _ready(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _run(x, taps, bias, step, cache=None, before=0) -> torch.Tensor:
    """taps [K, C out, C]; `before` also computes that many rows ahead of the first."""
    (b, n, cin), (k, cout, _) = x.shape, taps.shape
    y = x.new_empty(b, before + n, cout)
    old = x if cache is None else _ready(cache)
    tuned = _config.lookup("temporal_conv", x, 128)
    bm, bn, bk = tuned["tile"]
    shifted_product[(triton.cdiv(before + n, bm), triton.cdiv(cout, bn), b)](
        x, old, taps, taps if bias is None else bias.contiguous(), y, before + n, -before, n, step, cin, cout,
        *x.stride()[:2], *old.stride()[:2], *y.stride()[:2], *taps.stride(),
        K=k, CACHED=cache is not None, BIASED=bias is not None, BM=bm, BN=bn, BK=bk,
        num_warps=tuned["warps"], num_stages=tuned["stages"],
    )  # fmt: skip
    return y


@on_gpu(temporal_conv)
def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    frames: int,
    cache: torch.Tensor | None = None,
) -> torch.Tensor:
    """As reference, which serves fp64."""
    if x.dtype == torch.float64:
        return reference(x, weight, bias, frames, cache)
    _check(x, weight, bias, frames, cache)
    return _run(_ready(x), weight.permute(2, 0, 1).contiguous(), bias, x.shape[1] // frames, cache)


def _weight_gradient(grad, x, weight, frames, cache):
    step, n, rows = x.shape[1] // frames, x.shape[1], torch.zeros_like(weight)
    g, window = grad.flatten(0, 1).t(), _window(x, frames, cache, weight.shape[2] // 2)
    g = g.to(window.dtype)
    for k in range(weight.shape[2]):
        rows[:, :, k] = g @ window[:, k * step : k * step + n].flatten(0, 1)
    return rows, g.sum(1).to(weight.dtype)


def backward_reference(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, frames: int, cache: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight, bias and the cache (empty where there is none)."""
    step, n, w = x.shape[1] // frames, x.shape[1], _exact(weight)
    radius = weight.shape[2] // 2
    rows = torch.zeros_like(_window(x, frames, None, radius))
    for k in range(weight.shape[2]):
        rows[:, k * step : k * step + n] += _exact(grad) @ w[:, :, k]
    before, dx = rows[:, : radius * step].to(x.dtype), rows[:, radius * step : radius * step + n].to(x.dtype)
    dw, db = _weight_gradient(grad, x, weight, frames, cache)
    return dx.clone(), dw, db, before.clone() if cache is not None else x.new_empty(0)  # results may share no memory


temporal_conv_backward = torch.library.custom_op("tessera::temporal_conv_backward", backward_reference, mutates_args=())


@temporal_conv_backward.register_fake
def _fake_backward(grad, x, weight, frames, cache):
    old = x.new_empty(0 if cache is None else cache.shape)
    return x.new_empty(x.shape), torch.empty_like(weight), weight.new_empty(weight.shape[0]), old


@on_gpu(temporal_conv_backward)
def launch_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, frames: int, cache: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same product with the taps turned round and transposed; the weight's gradient is K plain products."""
    if x.dtype == torch.float64:
        return backward_reference(grad, x, weight, frames, cache)
    step = x.shape[1] // frames
    before = weight.shape[2] // 2 * step if cache is not None else 0
    rows = _run(_ready(grad), weight.flip(2).permute(2, 1, 0).contiguous(), None, step, before=before)
    dw, db = _weight_gradient(grad, x, weight, frames, cache)
    old = rows[:, :before].clone() if cache is not None else x.new_empty(0)
    return rows[:, before:].clone(), dw, db, old


def _save(ctx, inputs, output):
    x, weight, bias, ctx.frames, cache = inputs
    ctx.biased = bias is not None
    ctx.save_for_backward(x, weight, cache)


def _gradients(ctx, grad):
    x, weight, cache = ctx.saved_tensors
    dx, dw, db, old = temporal_conv_backward(grad, x, weight, ctx.frames, cache)
    return dx, dw, db if ctx.biased else None, None, None if cache is None else old


temporal_conv.register_autograd(_gradients, setup_context=_save)


def next_cache(x: torch.Tensor, frames: int, kernel: int, cache: torch.Tensor | None = None) -> torch.Tensor:
    """The last kernel // 2 frames of the clip so far [B, (kernel // 2) S, C], for the chunk after x [B, T S, C]."""
    rows = kernel // 2 * (x.shape[1] // frames)
    if rows > x.shape[1]:
        old = x.new_zeros(x.shape[0], rows, x.shape[2]) if cache is None else cache
        x = torch.cat((old, x), 1)
    return x[:, x.shape[1] - rows :].clone()


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """One SANA-Video layer of width 2240, 21 frames (one where tokens do not divide)."""
    x, weight = torch.randn(1, tokens, 2240, device=device), 0.02 * torch.randn(2240, 2240, 3, device=device)
    return x.to(dtype), weight.to(dtype), None, 1 if tokens % 21 else 21


def aot_specs() -> list[dict]:
    """bf16 with and without a cache, fp32."""
    specs = []
    wide = dict.fromkeys(("xb", "xn", "cb", "cn", "yb", "yn"), "i64")
    narrow = dict.fromkeys(("ROWS", "FIRST", "N", "S", "CIN", "COUT", "wk", "wo", "wi"), "i32")
    for dtype, bits, cached in (("bf16", 16, True), ("bf16", 16, False), ("fp32", 32, True)):
        per_target = {}
        for name in _config.tables():
            tuned = _config.entry("temporal_conv", name, bits, 128)
            tile = dict(zip(("BM", "BN", "BK"), tuned["tile"], strict=True))
            per_target[name] = {"warps": tuned["warps"], "stages": tuned["stages"], "const": tile}
        args = dict.fromkeys(("X", "CACHE", "WEIGHT", "BIAS", "Y"), f"*{dtype}") | wide | narrow
        const = {"K": 3, "CACHED": cached, "BIASED": cached, "BM": 64, "BN": 64, "BK": 32}
        expect = {"sm90": "HGMMA", "gfx942": "mfma"} if bits == 16 else {}
        spec = {"kernel": "shifted_product", "args": args, "const": const, "per_target": per_target, "expect": expect}
        tag = f"{dtype}{' cached' if cached else ''}"
        specs.append(spec | {"tag": tag, "unaligned": (*SIZES, "wi"), "extra": not cached or bits == 32})
    return specs
