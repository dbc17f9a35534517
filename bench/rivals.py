"""What each kernel is measured against, in the same process and on the same inputs. A kernel without an entry here is
measured against its reference."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

Run = Callable[[], Any]


@dataclass
class Rivals:
    runs: dict[str, Run] = field(default_factory=dict)
    truth: Run | None = None  # None: the kernel's reference
    memory_bound: bool = False
    facts: dict[str, float] = field(default_factory=dict)


def known(stem: str) -> bool:
    """Whether this kernel has a rival besides its reference."""
    return stem in RIVALS


def of(stem: str, inputs: tuple, device: str) -> Rivals:
    return RIVALS[stem](inputs, device) if known(stem) else Rivals()


def dense(q, k, v, device: str) -> dict[str, Run]:
    """Dense attention: torch's choice, and on a GPU each fused backend that takes the inputs."""
    runs: dict[str, Run] = {"dense SDPA": lambda: sdpa(q, k, v)}
    if device != "cuda":
        return runs
    for name, backend in (("FlashAttention", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):

        def run(backend=backend):
            with sdpa_kernel(backend):
                return sdpa(q, k, v)

        try:
            run()
        except RuntimeError:  # the backend does not serve this GPU or these inputs
            continue
        runs[name] = run
    try:
        from sageattention import sageattn
    except ImportError:
        return runs
    runs["SageAttention"] = lambda: sageattn(q, k, v, tensor_layout="HND")
    return runs


def block_sparse(inputs: tuple, device: str) -> Rivals:
    q, k, v, idx, cnt = inputs
    blocks = torch.zeros(*idx.shape[:3], -(-k.shape[2] // 64), dtype=torch.bool, device=idx.device)
    blocks.scatter_(3, idx.long(), True)

    def truth():
        rows = []
        for block in range(blocks.shape[2]):
            seen = blocks[:, :, block].repeat_interleave(64, 2)[:, :, None, : k.shape[2]]
            score = q[:, :, 64 * block : 64 * block + 64].float() @ k.float().transpose(2, 3) * q.shape[3] ** -0.5
            rows.append(score.masked_fill_(~seen, -math.inf).softmax(-1) @ v.float())
        return torch.cat(rows, 2)

    runs = dense(q, k, v, device)
    if device == "cuda":
        runs["FlexAttention"] = _flex(q, k, v, idx, cnt, blocks)
    return Rivals(runs, truth, facts={"pairs": blocks.float().mean().item()})


def _flex(q, k, v, idx, cnt, blocks) -> Run:
    """Compiled FlexAttention on the same lists. The mask is given too: without it from_kv_blocks means dense in eager
    mode."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def listed(b, h, i, j):
        return blocks[0, h, i // 64, j // 64]

    order = torch.cat([idx, idx.new_zeros(*idx.shape[:3], blocks.shape[3] - idx.shape[3])], 3)
    empty = torch.zeros_like(cnt)
    mask = BlockMask.from_kv_blocks(
        empty, order, cnt, order, BLOCK_SIZE=(64, 64), mask_mod=listed, seq_lengths=(q.shape[2], k.shape[2])
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask)


def forecast(inputs: tuple, device: str) -> Rivals:
    features, weights, dtype = inputs

    def eager():
        total = features[0] * weights[0]
        for feature, weight in zip(features[1:], weights[1:], strict=True):
            total = total + feature * weight
        return total.to(dtype)

    return Rivals({"eager sum": eager}, memory_bound=True)


def delta_rule(inputs: tuple, device: str) -> Rivals:
    """flash-linear-attention's chunk kernel, where it is installed."""
    from tessera.kernels.linear import delta_rule as ours

    if device != "cuda":
        return Rivals({"dense SDPA": lambda: sdpa(*inputs[:3])})
    try:
        ours.by_fla(*inputs)
    except (ImportError, RuntimeError):
        return Rivals()
    return Rivals({"flash-linear-attention": lambda: ours.by_fla(*inputs)})


RIVALS = {"block_sparse": block_sparse, "forecast": forecast, "delta_rule": delta_rule}
