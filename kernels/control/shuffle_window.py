"""Attention among shuffled scalars, the token mixer of RelaCtrl's control blocks (arXiv 2502.14377, TDSM).

All L d scalars of a group of d channels are permuted, x~[i] = x[p_i]; the sequence is cut into S equal segments, each read
as L / S tokens of d channels; one multi-head attention with shared weights mixes the tokens of each segment:

    y~ = softmax(q k^T / sqrt(d / h)) v W_p^T + b_p,   (q, k, v) = x~ W_qkv^T + b_qkv        y[p_i] = y~[i]

Its kernels carry scalars, not rows: one gathers x~, the other writes the product with W_p through p and saves a pass.
"""

from weakref import WeakValueDictionary

import torch
from torch.nn import functional

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
    weights = [None if w is None else w.to(exact) for w in (qkv_weight, qkv_bias, proj_weight, proj_bias)]
    at = perm.long()
    rows = x.flatten(1).index_select(1, at).view(x.shape).to(exact)
    rows = functional.linear(_attended(rows, *weights[:2], heads, segments), *weights[2:])
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


shuffle_window = torch.library.custom_op("tessera::shuffle_window", reference, mutates_args=())
shuffle_window.register_fake(lambda x, *_, **__: x.new_empty(x.shape))


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
