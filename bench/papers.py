"""Operators of papers as a whole, selection included, against the kernels of their authors where those are at hand
(official.py), and against dense attention."""

from collections.abc import Callable, Iterator
from typing import Any

import official
import rivals
import torch
import torch.nn.functional as F
from case import Case
from operators import TOLERANCE, attended, heads, listed, parts, seen_blocks

from tessera.kernels.attention import hierarchical_sparse as hierarchical
from tessera.kernels.attention.block_sparse import block_sparse
from tessera.kernels.attention.pool import pool
from tessera.kernels.attention.topk import hierarchical as select_levels
from tessera.kernels.attention.topk import topk
from tessera.kernels.linear.linear_attention import linear_attention

KEPT = 0.05  # of the key blocks
BLOCK_M, BLOCK_N = 128, 64
EPS = 1e-5  # of SLA's linear branch
LLSA_TOPK, LLSA_BLOCK = 8, 16


def cases(device: str) -> Iterator[Case]:
    """On a GPU: one attention layer of Wan 1.3B at 480p, and 256 x 256 pixels as tokens."""
    if device == "cuda":
        yield from sparse_linear_cases(32760, 12, 128, device, torch.bfloat16)
        yield from log_linear_cases(65536, 6, 64, device, torch.bfloat16)


def select(q, k, kept: float) -> tuple[torch.Tensor, torch.Tensor]:
    """SLA's choice: the key blocks whose mean is most like that of the query block; idx, cnt."""
    with torch.no_grad():
        mean_q, mean_k = pool(q, BLOCK_M, dtype=torch.float32), pool(k, BLOCK_N, dtype=torch.float32)
        return topk(mean_q @ mean_k.transpose(2, 3), max(1, int(kept * mean_k.shape[2])))


def sparse_linear(q, k, v, kept: float, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """SLA as released (arXiv 2509.24006): softmax over the selected blocks, plus a projection of linear attention over
    all keys. q, k, v [1, H, N, D], weight [D, D], bias [D]."""
    idx, cnt = select(q, k, kept)
    added = F.linear(linear_attention(q, k, v, feature_map="softmax", eps=EPS)[0], weight, bias)
    if torch.is_grad_enabled():  # a fused residual would form the softmax again in the backward pass
        return block_sparse(q, k, v, idx, cnt, block_m=BLOCK_M, block_n=BLOCK_N)[0] + added
    return block_sparse(q, k, v, idx, cnt, block_m=BLOCK_M, block_n=BLOCK_N, residual=added)[0]


def linear_branch(q, k, v, weight, bias) -> torch.Tensor:
    """Of sparse_linear by its definition, fp32."""
    q, k, v = (x.float() for x in (q, k, v))
    q, k = q.softmax(-1), k.softmax(-1)
    out = q @ (k.transpose(2, 3) @ v) / (EPS + (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True))
    return F.linear(out, weight.float(), bias.float())


def explicit(q, k, v, idx, weight, bias) -> torch.Tensor:
    """sparse_linear with given blocks, by its definition."""
    return listed(q, k, v, idx, BLOCK_M, BLOCK_N) + linear_branch(q, k, v, weight, bias)


def explicit_gradients(q, k, v, idx, weight, bias, grad) -> tuple[torch.Tensor, ...]:
    """Of q, k, v, by autograd through the definition, some queries at a time."""
    with torch.inference_mode(False), torch.enable_grad():
        q, k, v = (x.detach().clone().float().requires_grad_() for x in (q, k, v))
        grad, idx = grad.clone().float(), idx.clone()
        seen = seen_blocks(idx, k.shape[2], BLOCK_M, BLOCK_N)
        for at in parts(q.shape[2], BLOCK_M):
            attended(q[:, :, at], k, v, seen(at)).backward(grad[:, :, at])
        linear_branch(q, k, v, weight.clone(), bias.clone()).backward(grad)
    return q.grad, k.grad, v.grad


def backward_of(run: Callable[..., torch.Tensor], inputs: tuple, grad: torch.Tensor) -> rivals.Run:
    """The backward pass alone of run(q, k, v): gradients of the three."""
    with torch.inference_mode(False), torch.enable_grad():
        inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
        grad, out = grad.clone(), run(*inputs)
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def dense_backward(inputs: tuple, grad: torch.Tensor, device: str) -> dict[str, rivals.Run]:
    """Of each form of dense attention that has a backward pass."""
    found: dict[str, rivals.Run] = {}

    def attempt(name: str) -> None:
        run = backward_of(lambda q, k, v: rivals.dense(q, k, v, device)[name](), inputs, grad)
        run()
        found[name] = run

    for name in rivals.dense(*inputs, device):
        rivals.left_out(name, lambda name=name: attempt(name))
    return found


def sparse_linear_cases(tokens: int, count: int, width: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """SLA forwards, and backwards alone."""
    q, k, v = heads(tokens, count, width, device, dtype)
    weight = (4 * width**-0.5 * torch.randn(width, width, device=device)).to(dtype)
    bias = (0.01 * torch.randn(width, device=device)).to(dtype)  # both branches show in the sum
    with torch.inference_mode(False):  # for the graphs of the backward passes
        weight, bias = weight.clone(), bias.clone()
    grad, (idx, _) = torch.randn_like(q), select(q, k, KEPT)
    pairs = idx.shape[3] / -(-tokens // BLOCK_N)
    facts = {"pairs": pairs, "flops": pairs + 1.5 * width / tokens + 0.5 / (BLOCK_M * BLOCK_N)}
    title = f"{tokens} tokens, {count} x {width}, {KEPT:.0%} of the blocks, selection included, {str(dtype)[6:]}"
    forward = Case(
        "sparse_linear", title, lambda: sparse_linear(q, k, v, KEPT, weight, bias),
        lambda: explicit(q, k, v, idx, weight, bias), 2 * TOLERANCE[dtype], rivals.dense(q, k, v, device), facts=facts,
    )  # fmt: skip
    backward = Case(
        "sparse_linear", f"backward, {title}",
        backward_of(lambda q, k, v: sparse_linear(q, k, v, KEPT, weight, bias), (q, k, v), grad),
        lambda: explicit_gradients(q, k, v, idx, weight, bias, grad), 3 * TOLERANCE[dtype],
        dense_backward((q, k, v), grad, device), facts=facts, outputs=3,
    )  # fmt: skip
    plain = tuple(x.contiguous() for x in (q, k, v))
    more = KEPT, BLOCK_M, BLOCK_N, weight, bias

    def forward_rival() -> None:
        run, lists = official.sla(*plain, *more)
        forward.add("official SLA", run, lambda: explicit(q, k, v, *lists(), weight, bias))

    def backward_rival() -> None:
        run = backward_of(lambda q, k, v: official.sla(q, k, v, *more)[0](), plain, grad.contiguous())
        _, lists = official.sla(*plain, *more)
        backward.add("official SLA", run, lambda: explicit_gradients(q, k, v, *lists(), weight, bias, grad))

    forward.left_out = rivals.left_out("official SLA", forward_rival)
    yield forward
    backward.left_out = rivals.left_out("official SLA", backward_rival)
    yield backward


def chosen(q, k, v, topk: int, block: int) -> tuple[torch.Tensor, ...]:
    """What log_linear_attention attends to with two levels: idx, means of the keys and of the values, all levels."""
    pyramid = hierarchical.Pyramid(q.shape[2], block, 2)
    queries, keys, values = (hierarchical.pooled(x, pyramid) for x in (q, k, v))
    return select_levels(queries, keys, block, topk)[0], torch.cat(keys, 2), torch.cat(values, 2)


def over_levels(q, k, v, block: int, idx, keys, values) -> torch.Tensor:
    """Log-linear attention over given nodes and means by the reference, which serves fp64."""
    cnt = torch.full(idx.shape[:3], idx.shape[3], dtype=torch.int32, device=idx.device)
    wide = (x.double() for x in (q, k, v, keys, values))
    return hierarchical.hierarchical_sparse(*wide, idx, cnt, block, 2)[0]


def over_levels_gradients(q, k, v, block: int, grad, idx, keys, values) -> tuple[torch.Tensor, ...]:
    """Of q, k, v, through the attention and the means, whose values are the given ones."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = tuple(x.detach().clone().double().requires_grad_() for x in (q, k, v))
        pyramid, means = hierarchical.Pyramid(q.shape[2], block, 2), []
        for leaf, given in zip(leaves[1:], (keys, values), strict=True):
            mean = torch.cat(hierarchical.pooled(leaf, pyramid), 2)
            means.append(given.clone().double() + mean - mean.detach())
        out = over_levels(*leaves, block, idx.clone(), *means)
        return torch.autograd.grad(out, leaves, grad.clone().double())


def log_linear_cases(tokens: int, count: int, width: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """LLSA with two levels, as its authors' kernel has them: forwards, and backwards alone."""
    q, k, v = heads(tokens, count, width, device, dtype)
    grad, topk, block = torch.randn_like(q), LLSA_TOPK, LLSA_BLOCK

    def run(q, k, v) -> Any:
        return hierarchical.log_linear_attention(q, k, v, topk, block, 2)

    own = chosen(q, k, v, topk, block)
    facts = {"pairs": run(q, k, v)[2] / (count * tokens**2)}
    title = f"{tokens} tokens, {count} x {width}, {topk} of the blocks of {block} on 2 levels, selection included, "
    forward = Case(
        "log_linear", title + str(dtype)[6:], lambda: run(q, k, v), lambda: over_levels(q, k, v, block, *own),
        TOLERANCE[dtype], rivals.dense(q, k, v, device), facts=facts,
    )  # fmt: skip
    backward = Case(
        "log_linear", f"backward, {title}{str(dtype)[6:]}", backward_of(lambda *x: run(*x)[0], (q, k, v), grad),
        lambda: over_levels_gradients(q, k, v, block, grad, *own), 3 * TOLERANCE[dtype],
        dense_backward((q, k, v), grad, device), facts=facts, outputs=3,
    )  # fmt: skip
    plain = tuple(x.contiguous() for x in (q, k, v))

    def forward_rival() -> None:
        theirs, lists = official.llsa(*plain, topk, block)
        forward.add("official LLSA", theirs, lambda: over_levels(q, k, v, block, *lists()))

    def backward_rival() -> None:
        theirs = backward_of(lambda *x: official.llsa(*x, topk, block)[0](), plain, grad.contiguous())
        _, lists = official.llsa(*plain, topk, block)
        backward.add("official LLSA", theirs, lambda: over_levels_gradients(q, k, v, block, grad, *lists()))

    forward.left_out = rivals.left_out("official LLSA", forward_rival)
    yield forward
    backward.left_out = rivals.left_out("official LLSA", backward_rival)
    yield backward
