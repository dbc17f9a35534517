"""Depthwise K x K convolution over a token grid, channels last, with activation and gated product fused.

    p[y, x, c] = b[c] + sum_{i, j} w[c, i, j] t[y + i - K // 2, x + j - K // 2, c]      zeros outside the grid
    out = act(p), or with glu, p = (a, g) halves of the channels: out = a act(g)

It is the 5 x 5 convolution of the values in LiT (arXiv 2501.12976), the 3 x 3 and GELU of DiCo (arXiv 2505.11196), the
gated 3 x 3 of SANA's feed-forward (arXiv 2410.10629, section 2.2: act silu, glu) and the cross-stream convolution of
DiT4SR (arXiv 2503.23580). gelu is the exact one, gelu_tanh its tanh form. Frames of a video are folded into the batch.
"""

import torch

from .._triton import on_gpu, triton
from ._activation import ACTIVATIONS, activate, slope
from ._taps import BC, BN, SIZES, depthwise, depthwise_weight

STEPS = 32  # token tiles that one program sums for the weight's gradient


def _check(x, weight, bias, grid, activation, glu) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"Unknown activation {activation!r}; choose from {[*ACTIVATIONS]}.")
    if x.ndim != 3 or len(grid) != 2 or grid[0] * grid[1] != x.shape[1]:
        raise ValueError(f"Tokens {[*x.shape]} do not lie on the grid {[*grid]}: [B, H W, C]; fold frames into B.")
    c = x.shape[2]
    if weight.ndim != 3 or weight.shape[0] != c or weight.shape[1] != weight.shape[2] or weight.shape[1] % 2 == 0:
        raise ValueError(f"Depthwise weight {[*weight.shape]} must be [{c}, K, K] with odd K.")
    if bias is not None and bias.shape != (c,):
        raise ValueError(f"Bias {[*bias.shape]} must be [{c}].")
    if glu and c % 2:
        raise ValueError(f"A gated product needs an even number of channels, got {c}.")
    if not x.is_floating_point() or x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(f"Tokens and weights need one float dtype, got {x.dtype} and {weight.dtype}.")


def _exact(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _image(x: torch.Tensor, grid: list[int]) -> torch.Tensor:
    """[B, H W, C] -> fp32 [B, C, H, W], a view in channels-last memory."""
    return _exact(x).unflatten(1, grid).permute(0, 3, 1, 2)


def _linear(x, weight, bias, grid) -> torch.Tensor:
    """The convolution alone, fp32 [B, N, C]."""
    bias = None if bias is None else _exact(bias)
    w = _exact(weight)[:, None]
    y = torch.nn.functional.conv2d(_image(x, grid), w, bias, padding=weight.shape[1] // 2, groups=x.shape[2])
    return y.flatten(2).transpose(1, 2)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    grid: list[int],
    activation: str = "none",
    glu: bool = False,
) -> torch.Tensor:
    """x [B, H W, C], any strides, grid (H, W); weight [C, K, K], K odd; bias [C] -> [B, H W, C], or C / 2 with glu.

    Accumulates in fp32, fp64 in fp64. Raises ValueError when sizes, dtypes or names do not fit.
    """
    _check(x, weight, bias, grid, activation, glu)
    p = _linear(x, weight, bias, grid)
    if glu:
        a, g = p.chunk(2, 2)
        p = a * activate(g, activation)
    else:
        p = activate(p, activation)
    return p.to(x.dtype).contiguous()


depthwise_conv = torch.library.custom_op("tessera::depthwise_conv", reference, mutates_args=())


@depthwise_conv.register_fake
def _fake(x, weight, bias, grid, activation="none", glu=False):
    return x.new_empty(x.shape[0], x.shape[1], x.shape[2] // (2 if glu else 1))


def _ready(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _run(x, taps, bias, grid, activation, glu, grad=None, flip=False) -> torch.Tensor:
    """The kernel: act(conv), or with grad the gradient of conv."""
    k = int(taps.shape[0] ** 0.5)
    channels = taps.shape[1] // (2 if glu else 1)
    y = x.new_empty(x.shape[0], x.shape[1], taps.shape[1] if grad is not None else channels)
    g = x if grad is None else grad
    if y.numel():
        depthwise[(triton.cdiv(x.shape[1], BN), triton.cdiv(channels, BC), x.shape[0])](
            x, taps, taps if bias is None else bias, g, y, x.shape[1], grid[1], channels,
            *x.stride()[:2], *g.stride()[:2], *y.stride()[:2],
            K=k, KIND=ACTIVATIONS[activation], GLU=glu, FLIP=flip, BIASED=bias is not None, GRAD=grad is not None,
            BN=BN, BC=BC, num_warps=4,
        )  # fmt: skip
    return y


def _taps(weight: torch.Tensor) -> torch.Tensor:
    """[C, K, K] -> contiguous [K K, C], so that neighbouring channels are read together."""
    return weight.flatten(1).t().contiguous()


@on_gpu(depthwise_conv)
def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    grid: list[int],
    activation: str = "none",
    glu: bool = False,
) -> torch.Tensor:
    """As reference, which serves fp64."""
    if x.dtype == torch.float64:
        return reference(x, weight, bias, grid, activation, glu)
    _check(x, weight, bias, grid, activation, glu)
    return _run(_ready(x), _taps(weight), None if bias is None else bias.contiguous(), grid, activation, glu)


def backward_reference(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    grid: list[int],
    activation: str,
    glu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias (also where bias is None) from that of the result."""
    g = _exact(grad)
    if glu:
        a, gate = _linear(x, weight, bias, grid).chunk(2, 2)
        g = torch.cat((g * activate(gate, activation), g * a * slope(gate, activation)), 2)
    elif activation != "none":
        g = g * slope(_linear(x, weight, bias, grid), activation)
    pad, c = [weight.shape[1] // 2] * 2, x.shape[2]
    dx, dw, db = torch.ops.aten.convolution_backward(
        _image(g, grid),
        _image(x, grid),
        _exact(weight)[:, None],
        [c],
        [1, 1],
        pad,
        [1, 1],
        False,
        [0, 0],
        c,
        [True] * 3,
    )
    dx = dx.flatten(2).transpose(1, 2).to(x.dtype).contiguous()
    return dx, dw[:, 0].to(x.dtype).contiguous(), db.to(x.dtype)


depthwise_conv_backward = torch.library.custom_op(
    "tessera::depthwise_conv_backward", backward_reference, mutates_args=()
)
depthwise_conv_backward.register_fake(
    lambda grad, x, weight, *_: (x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(x.shape[2]))
)


@on_gpu(depthwise_conv_backward)
def launch_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    grid: list[int],
    activation: str,
    glu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if x.dtype == torch.float64:
        return backward_reference(grad, x, weight, bias, grid, activation, glu)
    grad, x, taps = _ready(grad), _ready(x), _taps(weight)
    if glu or activation != "none":
        grad = _run(x, taps, None if bias is None else bias.contiguous(), grid, activation, glu, grad)
    dx = _run(grad, taps, None, grid, "none", False, flip=True)
    (b, n, c), k = x.shape, weight.shape[1]
    splits = triton.cdiv(triton.cdiv(n, BN), STEPS)
    part = x.new_empty(b * splits, k * k + 1, c, dtype=torch.float32)
    depthwise_weight[(splits * (k * k + 1), triton.cdiv(c, BC), b)](
        x, grad, part, n, grid[1], c, STEPS, *x.stride()[:2], *grad.stride()[:2], K=k, BN=BN, BC=BC, num_warps=4
    )
    total = part.sum(0).to(x.dtype)
    return dx, total[:-1].t().clone(memory_format=torch.contiguous_format).unflatten(1, (k, k)), total[-1].clone()


def _save(ctx, inputs, output):
    x, weight, bias, ctx.grid, ctx.activation, ctx.glu = inputs
    ctx.save_for_backward(x, weight, bias)


def _gradients(ctx, grad):
    dx, dw, db = depthwise_conv_backward(grad, *ctx.saved_tensors, ctx.grid, ctx.activation, ctx.glu)
    return dx, dw, None if ctx.saved_tensors[2] is None else db, None, None, None


depthwise_conv.register_autograd(_gradients, setup_context=_save)


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """SANA's gated 3 x 3 over 2 x 2880 channels, a grid one token high."""
    x, weight = torch.randn(1, tokens, 5760, device=device), torch.randn(5760, 3, 3, device=device)
    return x.to(dtype), weight.to(dtype), None, [1, tokens], "silu", True


def aot_specs() -> list[dict]:
    """Windows 3 and 5, plain and gated, forward and backward."""
    specs: list[dict] = []
    sizes = {"N": "i32", "W": "i32", "C": "i32", **dict.fromkeys(("xb", "xn", "gb", "gn"), "i64")}
    for dtype, k, glu, grad in (
        ("bf16", 5, False, False),
        ("bf16", 3, True, False),
        ("bf16", 3, True, True),
        ("fp32", 5, False, True),
    ):
        args = dict.fromkeys(("X", "WEIGHT", "BIAS", "G", "Y"), f"*{dtype}") | sizes | {"yb": "i64", "yn": "i64"}
        const = {"K": k, "KIND": 2 if k == 5 else 1, "GLU": glu, "FLIP": False, "BIASED": True, "GRAD": grad}
        tag = f"{dtype} {k}x{k}{' glu' if glu else ''}{' gradient' if grad else ''}"
        specs.append({"kernel": "depthwise", "args": args, "const": const | {"BN": BN, "BC": BC}, "tag": tag})
    for dtype in ("bf16", "fp32"):
        args = {"X": f"*{dtype}", "G": f"*{dtype}", "PART": "*fp32", "SPLIT": "i32", **sizes}
        const = {"K": 3, "BN": BN, "BC": BC}
        specs.append({"kernel": "depthwise_weight", "args": args, "const": const, "tag": dtype})
    for i, spec in enumerate(specs):
        spec |= {"warps": 4, "stages": 3, "unaligned": tuple(SIZES), "extra": i not in (1, 4)}
    return specs
