"""Whole operators against dense attention, with everything in the timed region that a model would pay: pooling,
selection, reordering."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import rivals
import torch
from case import Case
from growth import Growth
from pack import load_pack

load_pack()

from tessera.archs import Layout
from tessera.kernels.attention import block_sparse as sparse
from tessera.kernels.attention import reorder
from tessera.kernels.attention.hierarchical_sparse import log_linear_attention
from tessera.kernels.linear.linear_attention import linear_attention
from tessera.methods.attention import local_window

KEPT, BLOCK = 0.1, 128
# What is promised on a CPU: times faster than dense SDPA in the same run.
PROMISES = {"block_sparse": {"float32": 7.0, "bfloat16": 10.0}, "window": 12.0, "linear": 15.0, "local_window": 1.5}
SLOPE = 1.15  # the most that the cost of a linear operator may grow with tokens, log over log


def heads(tokens: int, count: int, width: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k, v [1, count, tokens, width] in token-major memory."""
    return tuple(torch.randn(1, tokens, count, width, device=device).to(dtype).transpose(1, 2) for _ in range(3))


def random_lists(tokens: int, count: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A tenth of the key blocks for each query block and head, its own among them."""
    blocks = -(-tokens // BLOCK)
    score = torch.rand(1, count, blocks, blocks, device=device)
    score.diagonal(dim1=2, dim2=3).fill_(2)
    idx = score.topk(max(1, round(KEPT * blocks))).indices.sort(-1).values.int()
    return idx, torch.full(idx.shape[:3], idx.shape[3], dtype=torch.int32, device=device)


def windows(side: int, edge: int, device: str) -> Callable[..., torch.Tensor]:
    """Attention within windows of edge x edge tokens of a side x side picture: order, lists and back."""
    order = reorder.tile_order((1, side, side), (1, edge, edge)).to(device)
    back = reorder.inverse(order)
    rows = side * side // edge**2
    idx = torch.arange(rows, dtype=torch.int32, device=device).view(1, 1, rows, 1)
    cnt = torch.ones(1, 1, rows, dtype=torch.int32, device=device)

    def run(q, k, v):
        q, k, v = (x.index_select(2, order) for x in (q, k, v))
        out = sparse.block_sparse(q, k, v, idx, cnt, block_m=edge**2, block_n=edge**2)[0]
        return out.index_select(2, back)

    return run


def operator_cases(device: str) -> Iterator[Case]:
    """Block-sparse, window, linear and log-linear attention."""
    gpu = device == "cuda"
    sizes = (16896, 32760, 65536) if gpu else (4096, 8192, 16384)
    for dtype in (torch.bfloat16,) if gpu else (torch.float32, torch.bfloat16):
        name = str(dtype)[6:]
        for tokens in sizes:
            q, k, v = heads(tokens, 8, 64, device, dtype)
            idx, cnt = random_lists(tokens, 8, device)
            yield Case(
                "block_sparse", f"{tokens} tokens, 8 x 64, blocks of {BLOCK}, {name}",
                lambda q=q, k=k, v=v, i=idx, c=cnt: sparse.block_sparse(q, k, v, i, c, block_m=BLOCK, block_n=BLOCK),
                lambda q=q, k=k, v=v, i=idx: listed(q, k, v, i, BLOCK, BLOCK), TOLERANCE[dtype], rivals.dense(q, k, v, device),
                {} if gpu else {"dense SDPA": PROMISES["block_sparse"][name]},
                facts={"pairs": idx.shape[3] / idx.shape[2]},
            )  # fmt: skip
    dtype = torch.bfloat16 if gpu else torch.float32
    q, k, v = heads(4096, 8, 64, device, dtype)
    run = windows(64, 8, device)
    yield Case(
        "window", f"4096 tokens, 8 x 64, windows of 8 x 8, {str(dtype)[6:]}", lambda: run(q, k, v),
        lambda: windowed(q, k, v, 64, 8), TOLERANCE[dtype], rivals.dense(q, k, v, device),
        {} if gpu else {"dense SDPA": PROMISES["window"]}, facts={"pairs": 1 / 64},
    )  # fmt: skip
    yield Case(
        "linear_attention", f"4096 tokens, 8 x 64, relu, {str(dtype)[6:]}", lambda: linear_attention(q, k, v),
        lambda: explicit_linear(q, k, v), 2 * TOLERANCE[dtype], rivals.dense(q, k, v, device),
        {} if gpu else {"dense SDPA": PROMISES["linear"]}, facts={"flops": 64 / 4096},
    )  # fmt: skip
    for tokens in (16384, 65536) if gpu else (4096, 16384):
        q, k, v = heads(tokens, 6, 64, device, dtype)
        yield Case(
            "log_linear", f"{tokens} tokens, 6 x 64, 8 of the blocks of 16 a level, selection included, {str(dtype)[6:]}",
            lambda q=q, k=k, v=v: log_linear_attention(q, k, v), None, TOLERANCE[dtype], rivals.dense(q, k, v, device),
            facts={"pairs": log_linear_attention(q, k, v)[2] / (6 * tokens**2)},
        )  # fmt: skip


def method_cases(device: str) -> Iterator[Case]:
    """Local Window Attention at the promised point: 4,096 image tokens of which a query sees 11 %."""
    sizes = [(64, 8, 64, torch.float32), (64, 24, 128, torch.float32), (64, 8, 64, torch.bfloat16)]
    if device == "cuda":
        sizes = [(64, 24, 128, torch.bfloat16), (128, 24, 128, torch.bfloat16), (256, 24, 128, torch.bfloat16)]
    for side, count, width, dtype in sizes:
        tokens, radius = side * side, round(13.3 * side / 64)
        plan = local_window.build(Layout((1, side, side), slice(0, tokens), tokens), radius, device=device)
        q, k, v = heads(tokens, count, width, device, dtype)
        promised = (tokens, device, dtype) == (4096, "cpu", torch.float32)
        yield Case(
            "local_window", f"{tokens} tokens, {count} x {width}, radius {radius}, {str(dtype)[6:]}",
            lambda plan=plan, q=q, k=k, v=v: local_window.attend(plan, q, k, v),
            lambda plan=plan, q=q, k=k, v=v: in_window(plan, q, k, v), TOLERANCE[dtype],
            rivals.dense(q, k, v, device), {"dense SDPA": PROMISES["local_window"]} if promised else {},
            facts={"pairs": plan.pairs / plan.dense_pairs, "computed": plan.computed / plan.dense_pairs},
        )  # fmt: skip


def growths(device: str) -> Iterator[Growth]:
    """Operators whose cost is linear in the tokens, and dense attention beside them."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes = (16384, 32768, 65536, 131072) if device == "cuda" else (4096, 8192, 16384)

    def of(run: Callable[..., Any]) -> Callable[[int], Callable[[], Any]]:
        def make(tokens: int) -> Callable[[], Any]:
            q, k, v = heads(tokens, 4, 64, device, dtype)
            return lambda: run(q, k, v)

        return make

    def in_windows(tokens: int) -> Callable[[], Any]:
        tall, q, k, v = tokens // 64, *heads(tokens, 4, 64, device, dtype)
        plan = local_window.build(Layout((1, tall, 64), slice(0, tokens), tokens), 8, device=device)
        return lambda: local_window.attend(plan, q, k, v)

    yield Growth("linear_attention", of(linear_attention), sizes, SLOPE)
    yield Growth("log_linear", of(log_linear_attention), sizes, SLOPE)
    yield Growth("local_window", in_windows, sizes, SLOPE)


TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def parts(tokens: int, step: int) -> Iterator[slice]:
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def attended(q, k, v, mask: torch.Tensor | None) -> torch.Tensor:
    """Softmax attention by its definition in fp32; mask: the pairs that count."""
    score = q.float() @ k.float().transpose(2, 3) * q.shape[3] ** -0.5
    return (score if mask is None else score.masked_fill(~mask, -math.inf)).softmax(-1) @ v.float()


def by_rows(q, k, v, seen: Callable[[slice], torch.Tensor | None], step: int = 256) -> torch.Tensor:
    """The same, a few queries at a time; seen gives the pairs that count."""
    return torch.cat([attended(q[:, :, at], k, v, seen(at)) for at in parts(q.shape[2], step)], 2)


def seen_blocks(idx, keys: int, block_m: int, block_n: int) -> Callable[[slice], torch.Tensor]:
    """Of queries: which of so many keys lie in the blocks idx [1, H, nQ, W] of their query block."""
    kept = torch.zeros(*idx.shape[:3], -(-keys // block_n), dtype=torch.bool, device=idx.device)
    kept.scatter_(3, idx.long(), True)

    def seen(at: slice) -> torch.Tensor:
        rows = torch.arange(at.start, at.stop, device=idx.device) // block_m
        return kept[:, :, rows].repeat_interleave(block_n, 3)[..., :keys]

    return seen


def listed(q, k, v, idx, block_m: int, block_n: int) -> torch.Tensor:
    return by_rows(q, k, v, seen_blocks(idx, k.shape[2], block_m, block_n), block_m)


def windowed(q, k, v, side: int, edge: int) -> torch.Tensor:
    at = torch.arange(side * side, device=q.device)
    window = at // side // edge * (side // edge) + at % side // edge
    return by_rows(q, k, v, lambda rows: window[rows, None] == window[None])


def in_window(plan, q, k, v) -> torch.Tensor:
    place = torch.empty(plan.layout.total, 3, dtype=torch.long, device=q.device)
    place[plan.order] = plan.coords.long()

    def seen(at: slice) -> torch.Tensor:
        apart = (place[at, None] - place[None]).abs().unbind(-1)
        free = (place[at, None, 0] < 0) | (place[None, :, 0] < 0)
        return plan.window.inside(*apart) | free

    return by_rows(q, k, v, seen)


def explicit_linear(q, k, v) -> torch.Tensor:
    """relu(q) relu(k)^T v over its row sums, all pairs formed."""
    share = q.double().relu() @ k.double().relu().transpose(2, 3)
    return (share / (share.sum(-1, keepdim=True) + 1e-6)) @ v.double()
