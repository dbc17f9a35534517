"""Attention among shuffled scalars, the token mixer of RelaCtrl's control blocks (arXiv 2502.14377, TDSM).

All L d scalars of a group of d channels are permuted, x~[i] = x[p_i]; the sequence is cut into S equal segments, each read
as L / S tokens of d channels; one multi-head attention with shared weights mixes the tokens of each segment:

    y~ = softmax(q k^T / sqrt(d / h)) v W_p^T + b_p,   (q, k, v) = x~ W_qkv^T + b_qkv        y[p_i] = y~[i]

One kernel gathers x~ and another writes the product with W_p where p says, without a pass of its own. Gathering inside the
product with W_qkv would fetch each scalar, a sector of memory, once for each of its tiles of outputs: 27 times for 576
channels. That product and the softmax are the vendor's.
"""

from weakref import WeakValueDictionary

import torch
from torch.nn import functional

from .._triton import on_gpu, tl, triton

BLOCK, BM, BN, BK = 1024, 64, 64, 64  # scalars of one program; tokens, outputs and inputs of one tile of the product
SIZES = ["TOTAL", "L", "xb"]  # C is a multiple of 16 for all groups: known as such, rows are loaded in vectors
_jit = triton.jit(do_not_specialize=SIZES) if hasattr(triton, "__version__") else triton.jit
_held: WeakValueDictionary[tuple[int, int, str], torch.Tensor] = WeakValueDictionary()


def permutation(length: int, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """int32 [length], the same on every device for one seed. Drawn once for as long as someone holds it."""
    key = length, seed, str(device)
    found = _held.get(key)
    if found is None:
        drawn = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
        found = _held[key] = drawn.to(device, torch.int32)
    return found


def _check(x, perm, qkv_weight, qkv_bias, proj_weight, proj_bias, heads, segments) -> None:
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"A group of channels must be floating point [B, L, d], got {[*x.shape]} {x.dtype}.")
    length, d = x.shape[1:]
    if segments < 1 or length % segments:
        raise ValueError(
            f"Shuffled windows need a number of tokens that {segments} divides, got {length}: change the picture's size."
        )
    if heads < 1 or d % heads:
        raise ValueError(f"{heads} heads do not divide the {d} channels of the group.")
    if perm.dtype not in (torch.int32, torch.int64) or perm.shape != (length * d,):
        raise ValueError(f"The permutation {[*perm.shape]} {perm.dtype} must be int32 or int64 [{length * d}].")
    sizes = (3 * d, d), (3 * d,), (d, d), (d,)
    for w, size in zip((qkv_weight, qkv_bias, proj_weight, proj_bias), sizes, strict=True):
        if w is not None and (tuple(w.shape) != size or w.dtype != x.dtype):
            raise ValueError(f"Weights of {d} channels must be {[*size]} {x.dtype}, got {[*w.shape]} {w.dtype}.")


def _attended(rows, qkv_weight, qkv_bias, heads, segments) -> torch.Tensor:
    """Shuffled rows [B, L, d] -> what the heads found, [B S, L / S, d]."""
    qkv = functional.linear(rows, qkv_weight, qkv_bias).unflatten(1, (segments, -1)).flatten(0, 1)
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _mixed(x, perm, qkv_weight, qkv_bias, proj_weight, proj_bias, heads, segments) -> torch.Tensor:
    """As reference, in operations that autograd knows."""
    exact = torch.float32 if x.dtype == torch.float16 and x.device.type == "cpu" else x.dtype  # no fast product there
    given, added = (None if b is None else b.to(exact) for b in (qkv_bias, proj_bias))
    at = perm.long()
    rows = x.flatten(1).index_select(1, at).view(x.shape).to(exact)
    rows = functional.linear(
        _attended(rows, qkv_weight.to(exact), given, heads, segments), proj_weight.to(exact), added
    )
    return torch.zeros_like(x, memory_format=torch.contiguous_format).flatten(1).scatter(
        1, at.expand(x.shape[0], -1), rows.reshape(x.shape[0], -1).to(x.dtype)
    ).view(x.shape)  # fmt: skip


def reference(
    x: torch.Tensor,
    perm: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor | None,
    heads: int = 4,
    segments: int = 4,
) -> torch.Tensor:
    """x [B, L, d], any strides, L a multiple of segments; perm int32 or int64 [L d], each place once; qkv_weight
    [3 d, d], the rows of q, k, v one after another, each head by head; proj_weight [d, d]; biases [3 d], [d] or None.

    -> [B, L, d]. Sums run in at least fp32. Raises ValueError when sizes or dtypes do not fit."""
    _check(x, perm, qkv_weight, qkv_bias, proj_weight, proj_bias, heads, segments)
    return _mixed(x, perm, qkv_weight, qkv_bias, proj_weight, proj_bias, heads, segments)


@_jit
def gather_scalars(X, PERM, ROWS, TOTAL, C, xb, xn, BLOCK: tl.constexpr):
    """ROWS [B, TOTAL] = X [B, L, C] at PERM, whose numbers count the scalars row after row."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    p = tl.load(PERM + i, mask=i < TOTAL, other=0)
    x = tl.load(X + batch * xb + (p // C).to(tl.int64) * xn + p % C, mask=i < TOTAL, other=0.0)
    tl.store(ROWS + batch * TOTAL + i, x, mask=i < TOTAL)


@_jit
def scatter_product(
    A, WEIGHT, BIAS, PERM, Y, L, C, BIASED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """Y [B, L C] at PERM = A [B, L, C] WEIGHT [C, C]^T + BIAS, BM x BN scalars of it."""
    row, c, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    batch = tl.program_id(2).to(tl.int64) * L * C
    a_at, w_at = A + batch + row[:, None] * C + k[None, :], WEIGHT + c[None, :] * C + k[:, None]
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in tl.range(0, C, BK):
        a = tl.load(a_at + k0, mask=(row < L)[:, None] & (k < C - k0)[None, :], other=0.0)
        w = tl.load(w_at + k0, mask=(c < C)[None, :] & (k < C - k0)[:, None], other=0.0)
        acc = tl.dot(a, w, acc, input_precision="ieee")
    if BIASED:
        acc += tl.load(BIAS + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    mask = (row < L)[:, None] & (c < C)[None, :]
    p = tl.load(PERM + row[:, None] * C + c[None, :], mask=mask, other=0)
    tl.store(Y + batch + p, acc.to(Y.dtype.element_ty), mask=mask)


shuffle_window = torch.library.custom_op("tessera::shuffle_window", reference, mutates_args=())
shuffle_window.register_fake(lambda x, *_, **__: x.new_empty(x.shape))


@on_gpu(shuffle_window)
def launch(
    x: torch.Tensor,
    perm: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor | None,
    heads: int = 4,
    segments: int = 4,
) -> torch.Tensor:
    """As reference, which serves fp64 and more scalars than int32 counts. The values of perm are not read here: a number
    twice leaves a place unwritten."""
    if x.dtype == torch.float64 or perm.numel() >= 1 << 31:
        return reference(x, perm, qkv_weight, qkv_bias, proj_weight, proj_bias, heads, segments)
    _check(x, perm, qkv_weight, qkv_bias, proj_weight, proj_bias, heads, segments)
    (b, length, d), total = x.shape, perm.numel()
    x, perm = x if x.stride(2) == 1 else x.contiguous(), perm.int().contiguous()
    rows, y = x.new_empty(b, length, d), x.new_empty(b, length, d)
    if not y.numel():
        return y
    gather_scalars[(triton.cdiv(total, BLOCK), b)](x, perm, rows, total, d, *x.stride()[:2], BLOCK=BLOCK, num_warps=4)
    found = _attended(rows, qkv_weight, qkv_bias, heads, segments).contiguous()
    scatter_product[(triton.cdiv(length, BM), triton.cdiv(d, BN), b)](
        found, proj_weight.contiguous(), found if proj_bias is None else proj_bias.contiguous(), perm, y, length, d,
        BIASED=proj_bias is not None, BM=BM, BN=BN, BK=BK if x.element_size() < 4 else BK // 2, num_warps=4, num_stages=3,
    )  # fmt: skip
    return y


def _save(ctx, inputs, output):
    ctx.heads, ctx.segments = inputs[6:]
    ctx.save_for_backward(*inputs[:6])


def _gradients(ctx, grad):
    """Forms the forward pass again: its q, k and v are not kept."""
    x, perm, *weights = ctx.saved_tensors
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, *weights)]
    with torch.enable_grad():
        y = _mixed(leaves[0], perm, *leaves[1:], ctx.heads, ctx.segments)
    found = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], grad))
    dx, *rest = (None if t is None else next(found) for t in leaves)
    return dx, None, *rest, None, None


shuffle_window.register_autograd(_gradients, setup_context=_save)


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """PixArt's 1152 channels in two groups; a number of tokens that 4 divides."""
    length, d = -(-tokens // 4) * 4, 576
    sizes = (2, length, d), (3 * d, d), (3 * d,), (d, d), (d,)
    x, *weights = (torch.randn(s, device=device).to(dtype) * d**-0.5 for s in sizes)
    return x * d**0.5, permutation(length * d, 0, device), *weights


def aot_specs() -> list[dict]:
    """Both kernels, in bf16 and fp32."""
    specs: list[dict] = []
    for dtype in ("bf16", "fp32"):
        pointers = {"X": f"*{dtype}", "PERM": "*i32", "ROWS": f"*{dtype}"}
        args = pointers | {"TOTAL": "i32", "C": "i32", "xb": "i64", "xn": "i64"}
        specs.append({"kernel": "gather_scalars", "args": args, "const": {"BLOCK": BLOCK}})
        args = dict.fromkeys(("A", "WEIGHT", "BIAS", "Y"), f"*{dtype}") | {"PERM": "*i32", "L": "i32", "C": "i32"}
        const = {"BIASED": True, "BM": BM, "BN": BN, "BK": BK if dtype == "bf16" else BK // 2}
        specs.append({"kernel": "scatter_product", "args": args, "const": const})
        for spec in specs[-2:]:
            spec |= {"warps": 4, "stages": 3, "unaligned": tuple(SIZES), "tag": dtype, "extra": dtype != "bf16"}
    return specs
