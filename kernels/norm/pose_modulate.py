"""One block of DynamiCtrl's pose-adaptive norm (arXiv 2503.21246), a chain that never sees the noise:

    y = LN(c; w, b) (1 + scale) + shift        out = y, or base + s y        c' = (1 + gate) y

c are the tokens of the pose, c' those that the next block takes, base is what the block's own norm made of the picture
tokens. Done apart these are about six passes; here c and base are read once, out and c' written once. c may have a batch
of 1 beside a base of any: one chain then serves every row.
"""

import torch
from torch.nn import functional

from .._triton import on_gpu, tl, triton
from ._passes import WIDEST, _padded, _ready, exact
from ._rows import _load, _normalised, warps

CACHED = 1 << 19  # numbers of one piece of the reference: what is made of them stays in a CPU's cache
SIZES = ["B", "N", "C", "cb", "ab", "shift_b", "scale_b", "gate_b"]
_jit = triton.jit(do_not_specialize=SIZES) if hasattr(triton, "__version__") else triton.jit


def _check(c, weight, bias, shift, scale, gate, base) -> None:
    if c.ndim != 3 or 0 in c.shape or not c.is_floating_point():
        raise ValueError(f"Pose tokens must be floating point [B, N, C] and not empty, got {[*c.shape]} {c.dtype}.")
    b, n, width = c.shape
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (tuple(t.shape) != (width,) or t.dtype != c.dtype):
            raise ValueError(f"The norm's {name} {[*t.shape]} {t.dtype} must be {[width]} {c.dtype}.")
    for name, t in (("shift", shift), ("scale", scale), ("gate", gate)):
        if tuple(t.shape) not in ((1, width), (b, width)) or t.dtype != c.dtype:
            raise ValueError(f"{name} {[*t.shape]} {t.dtype} must be {[b, width]} {c.dtype}.")
    if base is None:
        return
    if base.ndim != 3 or base.shape[1:] != c.shape[1:] or b not in (1, base.shape[0]) or base.dtype != c.dtype:
        raise ValueError(
            f"Pose tokens {[*c.shape]} {c.dtype} cannot be added to {[*base.shape]} {base.dtype}: give the pose video the "
            "size and the number of frames of the latent."
        )


def _modulated(c, weight, bias, shift, scale, eps) -> torch.Tensor:
    """y in fp32 at least."""
    weight, bias = (None if t is None else exact(t) for t in (weight, bias))
    y = functional.layer_norm(exact(c), c.shape[2:], weight, bias, eps)
    return torch.addcmul(exact(shift)[:, None], y, 1 + exact(scale)[:, None])


def reference(
    c: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    gate: torch.Tensor,
    eps: float = 1e-5,
    base: torch.Tensor | None = None,
    strength: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """c [Bc, N, C], any strides; weight, bias [C] or None; shift, scale, gate [Bc or 1, C]; base [B, N, C], Bc 1 or B.

    -> out, y [Bc, N, C] or with base base + strength y [B, N, C], and c' [Bc, N, C]. Computes in fp32, fp64 in fp64.
    Raises ValueError when shapes or dtypes do not fit."""
    _check(c, weight, bias, shift, scale, gate, base)
    (b, n, width), opened = c.shape, 1 + exact(gate)[:, None]
    out, further = c.new_empty((c if base is None else base).shape), c.new_empty(b, n, width)
    step = max(1, CACHED // (len(out) * width)) if c.device.type == "cpu" else n
    for start in range(0, n, step):
        at = slice(start, start + step)
        y = _modulated(c[:, at], weight, bias, shift, scale, eps)
        out[:, at] = y if base is None else torch.add(exact(base[:, at]), y, alpha=strength)
        further[:, at] = y.mul_(opened)
    return out, further


@_jit
def pose_row(
    X, WEIGHT, BIAS, SHIFT, SCALE, GATE, BASE, OUT, NEXT, B, N, C, eps, strength, cb, cn, ab, an,
    shift_b, scale_b, gate_b, AFFINE: tl.constexpr, ADDED: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One row of X: OUT and NEXT. ADDED: the row goes into B rows of BASE, which lie ab apart. AFFINE: 1 a weight, 2 a
    bias, 3 both."""
    n, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BC)
    y, _ = _normalised(_load(X + batch * cb + n * cn, c, C), c, C, eps, False)
    if AFFINE % 2 == 1:
        y *= _load(WEIGHT, c, C)
    if AFFINE >= 2:
        y += _load(BIAS, c, C)
    y = y * (1.0 + _load(SCALE + batch * scale_b, c, C)) + _load(SHIFT + batch * shift_b, c, C)
    if ADDED:
        for step in tl.range(0, B):
            row = batch + step
            out = _load(BASE + row * ab + n * an, c, C) + strength * y
            tl.store(OUT + (row * N + n) * C + c, out.to(OUT.dtype.element_ty), mask=c < C)
    else:
        tl.store(OUT + (batch * N + n) * C + c, y.to(OUT.dtype.element_ty), mask=c < C)
    y *= 1.0 + _load(GATE + batch * gate_b, c, C)
    tl.store(NEXT + (batch * N + n) * C + c, y.to(NEXT.dtype.element_ty), mask=c < C)


pose_modulate = torch.library.custom_op("tessera::pose_modulate", reference, mutates_args=())


@pose_modulate.register_fake
def _fake(c, weight, bias, shift, scale, gate, eps=1e-5, base=None, strength=1.0):
    return c.new_empty((c if base is None else base).shape), c.new_empty(c.shape)


@on_gpu(pose_modulate)
def launch(
    c: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    gate: torch.Tensor,
    eps: float = 1e-5,
    base: torch.Tensor | None = None,
    strength: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference, which serves fp64 and more than 8192 channels."""
    if c.dtype == torch.float64 or c.shape[-1] > WIDEST:
        return reference(c, weight, bias, shift, scale, gate, eps, base, strength)
    _check(c, weight, bias, shift, scale, gate, base)
    c, (b, n, width) = _ready(c), c.shape
    added = c if base is None else _ready(base)
    further, out = c.new_empty(b, n, width), c.new_empty(added.shape)
    vectors = [t.expand(b, width) for t in (shift, scale, gate)]
    vectors = [t if t.stride(1) == 1 else t.contiguous() for t in vectors]
    affine = [c if t is None else t.contiguous() for t in (weight, bias)]
    pose_row[(n, b)](
        c, *affine, *vectors, added, out, further, len(added) // b, n, width, eps, strength, *c.stride()[:2],
        *added.stride()[:2], *(t.stride(0) for t in vectors), AFFINE=(weight is not None) + 2 * (bias is not None),
        ADDED=base is not None, BC=_padded(width), num_warps=warps(_padded(width), False),
    )  # fmt: skip
    return out, further


def _save(ctx, inputs, output):
    c, weight, bias, shift, scale, gate, ctx.eps, base, ctx.strength = inputs
    ctx.save_for_backward(c, weight, bias, shift, scale, gate, base)


def _gradients(ctx, *grads):
    """Forms the pass again in torch: no model is trained through it whole, only its norms."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
    *given, gate, base = leaves
    with torch.enable_grad():
        y = _modulated(*given, ctx.eps)
        out = y if base is None else torch.add(exact(base), y, alpha=ctx.strength)
        made = out.to(grads[0].dtype), (y * (1 + exact(gate)[:, None])).to(grads[1].dtype)
    found = iter(torch.autograd.grad(made, [t for t in leaves if t is not None], grads))
    *most, of_base = (None if t is None else next(found) for t in leaves)
    return *most, None, of_base, None


pose_modulate.register_autograd(_gradients, setup_context=_save)


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """CogVideoX's width, one chain for two rows of a picture."""
    sizes = (1, tokens, 3072), (3072,), (3072,), (1, 3072), (1, 3072), (1, 3072), (2, tokens, 3072)
    *most, base = (torch.randn(s, device=device).to(dtype) for s in sizes)
    return *most, 1e-5, base, 0.7


def aot_specs() -> list[dict]:
    """Rows of up to 4096 and 8192 channels, with and without a base."""
    specs: list[dict] = []
    for width, dtype, added in (
        (4096, "bf16", True),
        (4096, "fp32", True),
        (8192, "bf16", False),
        (1024, "fp32", False),
    ):
        names = ("X", "WEIGHT", "BIAS", "SHIFT", "SCALE", "GATE", "BASE", "OUT", "NEXT")
        args = dict.fromkeys(names, f"*{dtype}") | dict.fromkeys(("B", "N", "C"), "i32")
        args |= {"eps": "fp32", "strength": "fp32"}
        args |= dict.fromkeys(("cb", "cn", "ab", "an", "shift_b", "scale_b", "gate_b"), "i64")
        const = {"AFFINE": 3, "ADDED": added, "BC": width}
        spec: dict = {
            "kernel": "pose_row",
            "args": args,
            "const": const,
            "tag": f"{width} {dtype}{' added' if added else ''}",
        }
        spec |= {"warps": warps(width, False), "stages": 1, "unaligned": tuple(SIZES)}
        specs.append(spec | {"extra": width != 4096 or dtype != "bf16"})
    return specs
