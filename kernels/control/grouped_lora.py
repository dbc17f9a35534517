"""Low-rank adapters, each on its own tokens, added to what a frozen layer made of them:

    y[b, n] = base[b, n] + s_g (x[b, n] A_g^T) B_g^T        g the adapter of token n's segment in row b, -1: none

Segments along the sequence are EasyControl's conditions (arXiv 2503.07027), each with a LoRA of its own beside tokens
that have none; a segment of all tokens and an adapter for each row of the batch is the way of S-LoRA (arXiv 2311.03285).
All adapters run in two launches, whatever their number: down to the ranks, and up, onto y where it lies. Adapters of unlike
rank are padded; what pads them is not read.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch.nn import functional

from .._triton import on_gpu, triton
from ._lora import BK, BM, BN, BR, lora_down, lora_up

Run = tuple[slice, slice, int, int]  # rows of the batch, tokens, group, rank


def _check(x, down, up, ends, groups, scales, ranks, y) -> None:
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"Tokens must be floating point [B, N, K], got {[*x.shape]} {x.dtype}.")
    (b, n, k), count = x.shape, len(scales)
    if down.ndim != 3 or up.ndim != 3 or down.shape[::2] != (count, k) or up.shape[::2] != (count, down.shape[1]):
        raise ValueError(
            f"Adapters {[*down.shape]} and {[*up.shape]} must be [{count}, R, {k}] and [{count}, M, R] for {count} scales."
        )
    if y is not None and (tuple(y.shape) != (b, n, up.shape[1]) or y.dtype != x.dtype):
        raise ValueError(f"What is added to, {[*y.shape]} {y.dtype}, must be {[b, n, up.shape[1]]} {x.dtype}.")
    if not x.dtype == down.dtype == up.dtype:
        raise ValueError(f"Tokens and adapters need one dtype, got {x.dtype}, {down.dtype} and {up.dtype}.")
    if not ends or [*ends] != sorted(ends) or ends[0] < 0 or ends[-1] != n:
        raise ValueError(f"Segments end at {[*ends]}: ascending numbers, the last one {n} tokens.")
    if len(groups) not in (len(ends), b * len(ends)) or any(not -1 <= g < count for g in groups):
        raise ValueError(
            f"The adapters of {len(ends)} segments, or of those of {b} rows, must be {count} numbers from 0 or -1 (none), "
            f"got {[*groups]}."
        )
    if ranks is not None and (len(ranks) != count or any(not 0 <= r <= down.shape[1] for r in ranks)):
        raise ValueError(f"Ranks {[*ranks]} must be {count} numbers up to {down.shape[1]}.")


def _runs(batch: int, ends: list[int], groups: list[int], ranks: list[int] | None, most: int) -> Iterator[Run]:
    """What one adapter serves at once: neighbouring rows with the same adapter in one segment."""
    for i, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
        row = 0
        of = [*groups[i :: len(ends)]] * (1 if len(groups) > len(ends) else batch)
        while row < batch and stop > start:
            last = next((r for r in range(row, batch) if of[r] != of[row]), batch)
            if of[row] >= 0:
                yield slice(row, last), slice(start, stop), of[row], most if ranks is None else ranks[of[row]]
            row = last


def _add(y, x, down, up, ends, groups, scales, ranks) -> None:
    """y += .., in place. fp16 has no fast product on a CPU."""
    exact = torch.float32 if x.dtype == torch.float16 and x.device.type == "cpu" else x.dtype
    for rows, tokens, group, rank in _runs(x.shape[0], ends, groups, ranks, down.shape[1]):
        low = functional.linear(x[rows, tokens].to(exact), down[group, :rank].to(exact))
        wide = up[group, :, :rank].to(exact).t()
        for to, h in zip(y[rows, tokens], low, strict=True):
            if exact == y.dtype:
                to.addmm_(h, wide, alpha=scales[group])
            else:
                to.copy_(torch.addmm(to.to(exact), h, wide, alpha=scales[group]))


def reference(
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    ends: list[int],
    groups: list[int],
    scales: list[float],
    ranks: list[int] | None = None,
    base: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [B, N, K], any strides; down [G, R, K], up [G, M, R]; ends: where each segment of the N tokens ends, ascending, the
    last one N; groups: the adapter of each segment, or of each row's segments, row after row, -1: none; scales, ranks:
    of each adapter, ranks None: all R; base [B, N, M] or None: 0.

    -> [B, N, M]. Sums run in at least fp32. Raises ValueError when sizes or dtypes do not fit."""
    _check(x, down, up, ends, groups, scales, ranks, base)
    y = x.new_zeros(*x.shape[:2], up.shape[1])
    y = y if base is None else y.copy_(base)
    _add(y, x, down, up, ends, groups, scales, ranks)
    return y


grouped_lora = torch.library.custom_op("tessera::grouped_lora", reference, mutates_args=())


@grouped_lora.register_fake
def _fake(x, down, up, *_, **__):
    return x.new_empty(*x.shape[:2], up.shape[1])


@lru_cache(64)
def _tables(device, batch, ends, groups, scales, ranks, most) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles int32 [T, 5] of at most BM tokens, and the scales; kept, for a run asks the same in every layer and step."""
    tiles = [
        (row, first, tokens.stop, group, rank)
        for rows, tokens, group, rank in _runs(batch, ends, groups, ranks, most)
        for row in range(rows.start, rows.stop)
        for first in range(tokens.start, tokens.stop, BM)
    ]
    return torch.tensor(tiles, dtype=torch.int32).to(device), torch.tensor(scales).to(device)


def _launch(y, x, down, up, ends, groups, scales, ranks) -> None:
    """y += .. by the kernels; y and x have a last stride of 1."""
    (b, n, k), (m, most) = x.shape, up.shape[1:]
    key = tuple(ends), tuple(groups), tuple(scales), None if ranks is None else tuple(ranks)
    tiles, scale = _tables(x.device, b, *key, most)
    if not len(tiles) or not most or not m:
        return
    down, up, low = down.contiguous(), up.contiguous(), x.new_empty(b, n, most)
    lora_down[(len(tiles), triton.cdiv(most, BR))](
        x, down, low, tiles, n, k, most, *x.stride()[:2], BM=BM, BR=BR, BK=BK, num_warps=4, num_stages=3
    )
    lora_up[(len(tiles), triton.cdiv(m, BN))](
        low, up, scale, y, tiles, n, m, most, *y.stride()[:2], BM=BM, BR=BR, BN=BN, num_warps=4, num_stages=3
    )


@on_gpu(grouped_lora)
def launch(
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    ends: list[int],
    groups: list[int],
    scales: list[float],
    ranks: list[int] | None = None,
    base: torch.Tensor | None = None,
) -> torch.Tensor:
    """As reference, which serves fp64."""
    if x.dtype == torch.float64:
        return reference(x, down, up, ends, groups, scales, ranks, base)
    _check(x, down, up, ends, groups, scales, ranks, base)
    y = x.new_zeros(*x.shape[:2], up.shape[1])
    y = y if base is None else y.copy_(base)
    _launch(y, x if x.stride(2) == 1 else x.contiguous(), down, up, ends, groups, scales, ranks)
    return y


def add_reference(
    y: torch.Tensor,
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    ends: list[int],
    groups: list[int],
    scales: list[float],
    ranks: list[int] | None = None,
) -> None:
    """As reference, added to y [B, N, M], any strides, in place. It has no gradient."""
    _check(x, down, up, ends, groups, scales, ranks, y)
    _add(y, x, down, up, ends, groups, scales, ranks)


grouped_lora_add = torch.library.custom_op("tessera::grouped_lora_add", add_reference, mutates_args=("y",))
grouped_lora_add.register_fake(lambda *_, **__: None)


@on_gpu(grouped_lora_add)
def launch_add(
    y: torch.Tensor,
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    ends: list[int],
    groups: list[int],
    scales: list[float],
    ranks: list[int] | None = None,
) -> None:
    """As add_reference, which serves fp64 and columns of y that are no neighbours."""
    if x.dtype == torch.float64 or y.stride(2) != 1:
        return add_reference(y, x, down, up, ends, groups, scales, ranks)
    _check(x, down, up, ends, groups, scales, ranks, y)
    _launch(y, x if x.stride(2) == 1 else x.contiguous(), down, up, ends, groups, scales, ranks)


def backward_reference(
    grad: torch.Tensor,
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    ends: list[int],
    groups: list[int],
    scales: list[float],
    ranks: list[int] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, down and up; of what pads a rank they are 0."""
    exact = torch.promote_types(x.dtype, torch.float32)
    dx, ddown, dup = (torch.zeros(t.shape, dtype=exact, device=x.device) for t in (x, down, up))
    for rows, tokens, group, rank in _runs(x.shape[0], ends, groups, ranks, down.shape[1]):
        a, b = down[group, :rank].to(exact), up[group, :, :rank].to(exact)
        given, of_out = (
            x[rows, tokens].to(exact).flatten(0, 1),
            grad[rows, tokens].to(exact).flatten(0, 1) * scales[group],
        )
        of_low = of_out @ b
        dup[group, :, :rank] += of_out.t() @ (given @ a.t())
        ddown[group, :rank] += of_low.t() @ given
        dx[rows, tokens] = (of_low @ a).view(dx[rows, tokens].shape)
    return dx.to(x.dtype), ddown.to(x.dtype), dup.to(x.dtype)


grouped_lora_backward = torch.library.custom_op("tessera::grouped_lora_backward", backward_reference, mutates_args=())
grouped_lora_backward.register_fake(lambda grad, x, down, up, *_: tuple(t.new_empty(t.shape) for t in (x, down, up)))


def _save(ctx, inputs, output) -> None:
    x, down, up, *ctx.lists, base = inputs
    ctx.save_for_backward(x, down, up)
    ctx.added = base is not None


def _gradients(ctx, grad):
    dx, ddown, dup = grouped_lora_backward(grad, *ctx.saved_tensors, *ctx.lists)
    return dx, ddown, dup, None, None, None, None, grad if ctx.added else None


grouped_lora.register_autograd(_gradients, setup_context=_save)


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """FLUX's queries, keys and values: two conditions with LoRA of rank 128 and 16 behind a text that has none."""
    x, base = (torch.randn(1, tokens, n, device=device).to(dtype) for n in (3072, 9216))
    down, up = (torch.randn(2, *s, device=device).to(dtype) * 0.02 for s in ((128, 3072), (9216, 128)))
    return x, down, up, [tokens // 8, tokens // 2, tokens], [-1, 0, 1], [1.0, 0.7], [128, 16], base
