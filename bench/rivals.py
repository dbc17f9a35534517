"""What each kernel is measured against, in the same process and on the same inputs. A kernel without an entry here is
measured against its reference."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from control_adapters import PLAIN
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

Run = Callable[[], Any]


@dataclass
class Rivals:
    runs: dict[str, Run] = field(default_factory=dict)
    truth: Run | None = None  # None: the kernel's reference
    memory_bound: bool = False
    facts: dict[str, float] = field(default_factory=dict)
    same: dict[str, Run] = field(default_factory=dict)  # as in Case
    left_out: dict[str, str] = field(default_factory=dict)


def known(stem: str, device: str) -> bool:
    """Whether this kernel has a rival besides its reference."""
    return stem in RIVALS or (device == "cuda" and stem in ON_GPU)


def of(stem: str, inputs: tuple, device: str) -> Rivals:
    return {**ON_GPU, **RIVALS}[stem](inputs, device) if known(stem, device) else Rivals()


def left_out(name: str, attempt: Callable[[], Any]) -> dict[str, str]:
    """{name: why it failed, in one line}, empty when it did not."""
    try:
        attempt()
    except Exception as e:  # code of others: whatever it raises, the report goes on without it
        first = (str(e).strip().splitlines() or [""])[0][:200]
        return {name: first if isinstance(e, FileNotFoundError) else f"{type(e).__name__}: {first}"}
    return {}


def dense(q, k, v, device: str) -> dict[str, Run]:
    """Dense attention: torch's choice, and on a GPU each fused backend that takes the inputs."""
    runs: dict[str, Run] = {"dense SDPA": lambda: sdpa(q, k, v)}
    if device != "cuda":
        return runs
    for name, backend in (("FlashAttention", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):

        def run(backend=backend):
            with sdpa_kernel(backend):
                return sdpa(q, k, v)

        if not left_out(name, run):  # else the backend does not serve this GPU or these inputs
            runs[name] = run

    def sage():
        from sageattention import sageattn

        return sageattn(q, k, v, tensor_layout="HND")

    if not left_out("SageAttention", sage):
        runs["SageAttention"] = sage
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

    found = Rivals(dense(q, k, v, device), truth, facts={"pairs": blocks.float().mean().item()})
    if device == "cuda":
        found.runs["FlexAttention"] = _flex(q, k, v, idx, cnt, blocks)
        found.same["FlexAttention"] = truth
    return found


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


def _with_fla(found: Rivals, module: Any, inputs: tuple) -> Rivals:
    """And flash-linear-attention's chunk kernel, where it is installed."""

    def run():
        return module.by_fla(*inputs)

    name = "flash-linear-attention"
    found.left_out = left_out(name, run)
    if not found.left_out:
        found.runs[name], found.same[name] = run, lambda: module.reference(*inputs)
    return found


def delta_rule(inputs: tuple, device: str) -> Rivals:
    from tessera.kernels.linear import delta_rule as ours

    q, _, v = inputs[:3]
    n, d, e, chunk = *q.shape[2:], v.shape[3], 64
    share = (6 * d * e + chunk * (6 * d + 4 * e)) / (2 * n * (d + e))  # products of a token in the chunk form
    found = Rivals({"dense SDPA": lambda: sdpa(*inputs[:3])}, facts={"flops": share})
    return _with_fla(found, ours, inputs) if device == "cuda" else found


def ssd(inputs: tuple, device: str) -> Rivals:
    from tessera.kernels.linear import ssd as ours

    found = Rivals({"reference": lambda: ours.reference(*inputs)})
    return _with_fla(found, ours, inputs)


def rotate(inputs: tuple, device: str) -> Rivals:
    """The product with the matrix itself."""
    from tessera.kernels.quant._hadamard import turned

    x, signs, block = inputs
    matrix = turned(torch.eye(block, device=device), block, "regular").to(x.dtype)
    return Rivals({"dense matrix": lambda: ((x * signs).unflatten(-1, (-1, block)) @ matrix).flatten(-2)}, None, True)


def quantize_rows(inputs: tuple, device: str) -> Rivals:
    """Rotation and rounding one after the other; comfy_kitchen's way to do both, where it runs."""
    from tessera.kernels.quant import quantize_rows as ours
    from tessera.kernels.quant._hadamard import turned

    x, format, *_, block = inputs
    matrix = turned(torch.eye(block, device=device), block, "regular").to(x.dtype)

    def plain():
        y = (x.unflatten(-1, (-1, block)) @ matrix).flatten(-2).flatten(0, -2)
        scale = y.abs().amax(-1, keepdim=True).float() / 127
        return (y / scale).round().to(torch.int8), scale[:, 0]

    def kitchen():
        from comfy_kitchen.registry import registry

        return registry.get_implementation("quantize_and_rotate_rowwise")(x.flatten(0, -2), matrix, block)

    found = Rivals({"rotate, then round": plain}, memory_bound=True)
    found.left_out = left_out("comfy_kitchen", kitchen)
    if not found.left_out:
        found.runs["comfy_kitchen"], found.same["comfy_kitchen"] = kitchen, lambda: ours.reference(*inputs)
    return found


def scaled_linear(inputs: tuple, device: str) -> Rivals:
    """The layer in 16 bits; torch's product of int8 with the scales after it."""
    x, x_scale, w, w_scale, bias, dtype = inputs
    wide, plain = x.to(dtype) * x_scale[:, None].to(dtype), w.to(dtype) * w_scale[:, None].to(dtype)
    found = Rivals({"16-bit linear": lambda: torch.nn.functional.linear(wide, plain, bias)})
    found.runs["torch._int_mm"] = lambda: (torch._int_mm(x, w.t()) * x_scale[:, None] * w_scale + bias).to(dtype)
    return found


def plain(stem: str) -> Callable[[tuple, str], Rivals]:
    """Plain torch in the inputs' dtype, and as the truth in fp32."""
    name, run, memory_bound = PLAIN[stem]

    def against(inputs: tuple, device: str) -> Rivals:
        exact = [x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
        return Rivals({name: lambda: run(*inputs)}, lambda: run(*exact), memory_bound)

    return against


DENSE = ("dense SDPA", "FlashAttention", "cuDNN", "SageAttention")
RIVALS = {"block_sparse": block_sparse, "forecast": forecast, "delta_rule": delta_rule, "rotate": rotate}
RIVALS |= {stem: plain(stem) for stem in PLAIN}
ON_GPU = {"ssd": ssd, "quantize_rows": quantize_rows, "scaled_linear": scaled_linear}
