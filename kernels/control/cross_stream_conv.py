"""GELU of two token streams and a depthwise convolution from the second into the first, token-major:

    g = gelu(r)        out[n] = gelu(a[n]) + s (b + sum_t w[t] g[n + t])        t over K x K, zeros outside the grid

The feed-forward of DiT4SR (arXiv 2503.23580): a and r are the hidden activations of the picture and of the low-resolution
tokens that lie on the same grid, s is 1.2 there. g goes on to the second linear layer, so it is written anyway, and the
convolution reads it back: a GELU for each of the taps costs a GPU more than that.
"""

import torch

from .._triton import on_gpu, tl, triton
from ..conv._activation import ACTIVATIONS, activate, activated, slope
from ..conv._taps import BC, BN, _convolved
from ..conv.depthwise_conv import depthwise_conv_backward

GELU = {"none": "gelu", "tanh": "gelu_tanh"}
SIZES = ["N", "W", "C", "ab"]
_jit = triton.jit(do_not_specialize=SIZES) if hasattr(triton, "__version__") else triton.jit


def _check(a, r, weight, bias, grid, approximate) -> None:
    if approximate not in GELU:
        raise ValueError(f"Unknown GELU {approximate!r}; choose none (exact) or tanh.")
    if a.ndim != 3 or a.shape != r.shape or len(grid) != 2 or grid[0] * grid[1] != a.shape[1]:
        raise ValueError(
            f"Streams {[*a.shape]} and {[*r.shape]} must both be [B, H W, C] on the grid {[*grid]}: "
            "the two pictures need one size."
        )
    c, k = a.shape[2], weight.shape[-1]
    if tuple(weight.shape) != (c, 1, k, k) or k % 2 == 0:
        raise ValueError(f"Depthwise weight {[*weight.shape]} must be [{c}, 1, K, K] with odd K.")
    if bias is not None and bias.shape != (c,):
        raise ValueError(f"Bias {[*bias.shape]} must be [{c}].")
    dtypes = {t.dtype for t in (a, r, weight, bias) if t is not None}
    if len(dtypes) > 1 or not a.is_floating_point():
        raise ValueError(f"Streams and weights need one float dtype, got {' and '.join(sorted(map(str, dtypes)))}.")


def _exact(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def reference(
    a: torch.Tensor,
    r: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    grid: list[int],
    scale: float = 1.2,
    approximate: str = "tanh",
) -> tuple[torch.Tensor, torch.Tensor]:
    """a, r [B, H W, C], any strides, grid (H, W); weight [C, 1, K, K], K odd; bias [C]; approximate as in torch's gelu.

    -> out and g, both [B, H W, C]. In fp32, fp64 in fp64; the convolution takes g as it is returned, rounded to its
    dtype. Raises ValueError when sizes, dtypes or the name do not fit."""
    _check(a, r, weight, bias, grid, approximate)
    g = activate(_exact(r), GELU[approximate]).to(r.dtype).contiguous()
    image = _exact(g).unflatten(1, grid).permute(0, 3, 1, 2)  # channels-last memory
    bias = None if bias is None else _exact(bias)
    mixed = torch.nn.functional.conv2d(image, _exact(weight), bias, padding=weight.shape[-1] // 2, groups=a.shape[2])
    out = activate(_exact(a), GELU[approximate]).add(mixed.flatten(2).transpose(1, 2), alpha=scale)
    return out.to(a.dtype).contiguous(), g


@_jit
def cross_stream(
    A, G, WEIGHT, BIAS, OUT, N, W, C, scale, ab, an,
    K: tl.constexpr, KIND: tl.constexpr, BIASED: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """OUT = gelu(A) + scale conv(G); G and OUT are contiguous [B, N, C]."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    batch = tl.program_id(2).to(tl.int64)
    mixed = _convolved(G + batch * N * C, WEIGHT, BIAS, n, c, N, W, C, C, K, False, BIASED, BN, BC)
    mask, row = (n < N)[:, None] & (c < C)[None, :], n.to(tl.int64)[:, None]
    a = tl.load(A + batch * ab + row * an + c[None, :], mask=mask, other=0.0).to(tl.float32)
    out = activated(a, KIND) + scale * mixed
    tl.store(OUT + (batch * N + row) * C + c[None, :], out.to(OUT.dtype.element_ty), mask=mask)


cross_stream_conv = torch.library.custom_op("tessera::cross_stream_conv", reference, mutates_args=())
cross_stream_conv.register_fake(lambda a, r, *_, **__: (a.new_empty(a.shape), r.new_empty(r.shape)))


@on_gpu(cross_stream_conv)
def launch(
    a: torch.Tensor,
    r: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    grid: list[int],
    scale: float = 1.2,
    approximate: str = "tanh",
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference, which serves fp64."""
    if a.dtype == torch.float64:
        return reference(a, r, weight, bias, grid, scale, approximate)
    _check(a, r, weight, bias, grid, approximate)
    a, (b, n, c) = a if a.stride(2) == 1 else a.contiguous(), a.shape
    g, out = activate(r, GELU[approximate]).contiguous(), a.new_empty(b, n, c)
    taps = weight.flatten(1).t().contiguous()  # [K K, C]: neighbouring channels are read together
    if out.numel():
        cross_stream[(triton.cdiv(n, BN), triton.cdiv(c, BC), b)](
            a, g, taps, taps if bias is None else bias.contiguous(), out, n, grid[1], c, scale, *a.stride()[:2],
            K=weight.shape[-1], KIND=ACTIVATIONS[GELU[approximate]], BIASED=bias is not None, BN=BN, BC=BC, num_warps=4,
        )  # fmt: skip
    return out, g


def _save(ctx, inputs, output):
    a, r, weight, bias, ctx.grid, ctx.scale, ctx.approximate = inputs
    ctx.save_for_backward(a, r, weight, bias, output[1])


def _gradients(ctx, grad, grad_g):
    """The convolution's own gradients come from the depthwise kernels; GELU is left to torch."""
    a, r, weight, bias, g = ctx.saved_tensors
    name = GELU[ctx.approximate]
    dg, dw, db = depthwise_conv_backward(grad * ctx.scale, g, weight[:, 0], bias, ctx.grid, "none", False)
    da = (_exact(grad) * slope(_exact(a), name)).to(a.dtype)
    dr = ((_exact(dg) + _exact(grad_g)) * slope(_exact(r), name)).to(r.dtype)
    return da, dr, dw[:, None], None if bias is None else db, None, None, None


cross_stream_conv.register_autograd(_gradients, setup_context=_save)


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """The hidden width of SD3.5 medium, a grid two tokens high where that is possible."""
    a, r = (torch.randn(1, tokens, 6144, device=device).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(s, device=device).to(dtype) for s in ((6144, 1, 3, 3), (6144,)))
    high = 2 - tokens % 2
    return a, r, weight, bias, [high, tokens // high]


def aot_specs() -> list[dict]:
    """SD3.5's convolution in bf16 and fp32."""
    specs: list[dict] = []
    for dtype in ("bf16", "fp32"):
        args = dict.fromkeys(("A", "G", "WEIGHT", "BIAS", "OUT"), f"*{dtype}") | dict.fromkeys(("N", "W", "C"), "i32")
        args |= {"scale": "fp32", "ab": "i64", "an": "i64"}
        const = {"K": 3, "KIND": 3, "BIASED": True, "BN": BN, "BC": BC}
        spec: dict = {"kernel": "cross_stream", "args": args, "const": const, "tag": dtype, "extra": dtype != "bf16"}
        specs.append(spec | {"warps": 4, "stages": 3, "unaligned": tuple(SIZES)})
    return specs
