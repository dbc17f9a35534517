"""Relative L1 change of a pair, mean |a - b| / mean |b|: the measure by which TeaCache (arXiv 2411.19108, section 3.2) and
first-block caches decide whether to compute a step.

One pass over both tensors; each program writes one pair of partial sums and a second program adds those in their order,
so the same inputs give the same bits. The answer stays on the device: reading it there and then would wait for the GPU.
"""

import torch

from .._triton import on_gpu, tl, triton

BLOCK = 1024  # elements of one load
STEPS = 16  # loads of one program
CPU_CHUNK = 1 << 16  # elements; a chunk's fp32 copies stay in the L2 cache
GPU_CHUNK = 1 << 24  # bounds the fp32 copies where the reference serves a GPU


def _check(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape != b.shape or a.device != b.device:
        raise ValueError(
            f"A pair must have one shape and device, got {[*a.shape]} on {a.device} and {[*b.shape]} on {b.device}; "
            "forget the stored tensor when the size changes."
        )
    if not (a.is_floating_point() and b.is_floating_point()) or a.numel() == 0:
        raise ValueError(f"A pair must be floating point and not empty, got {a.dtype}, {b.dtype}, {[*a.shape]}.")


def _ratio(change: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    return torch.where(change == 0, 0.0, change / size)


def reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a, b of one shape [...], any strides -> mean |a - b| / mean |b|, fp32 scalar tensor (fp64 for two fp64 tensors).

    0 for equal tensors, also zeros; inf where b alone is 0. Raises ValueError for unlike or empty tensors.
    """
    _check(a, b)
    exact = torch.float64 if a.dtype == b.dtype == torch.float64 else torch.float32
    rows = a.reshape(-1), b.reshape(-1)
    chunk = CPU_CHUNK if a.device.type == "cpu" else GPU_CHUNK
    parts = []
    for start in range(0, a.numel(), chunk):
        x, y = (row[start : start + chunk].to(exact) for row in rows)
        parts.append(torch.stack(((x - y).abs().sum(), y.abs().sum())))
    return _ratio(*torch.stack(parts).sum(0))


@triton.jit
def relative_parts(A, B, PART, n, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """PART [P, 2]: sum |a - b| and sum |b| over this program's BLOCK x STEPS elements."""
    program = tl.program_id(0).to(tl.int64)
    start = program * (BLOCK * STEPS)  # the tensors may hold more than 2^31 elements
    i = tl.arange(0, BLOCK)
    change = tl.zeros([BLOCK], tl.float32)
    size = tl.zeros([BLOCK], tl.float32)
    for step in tl.range(0, STEPS):
        mask = i < n - start - step * BLOCK
        a = tl.load(A + start + step * BLOCK + i, mask, 0.0).to(tl.float32)
        b = tl.load(B + start + step * BLOCK + i, mask, 0.0).to(tl.float32)
        change += tl.abs(a - b)
        size += tl.abs(b)
    tl.store(PART + 2 * program, tl.sum(change))
    tl.store(PART + 2 * program + 1, tl.sum(size))


@triton.jit
def relative_total(PART, OUT, count, BLOCK: tl.constexpr):
    """OUT = sum of the first column of PART [count, 2] over that of the second."""
    i = tl.arange(0, BLOCK)
    change = tl.zeros([BLOCK], tl.float32)
    size = tl.zeros([BLOCK], tl.float32)
    for step in tl.range(0, (count + BLOCK - 1) // BLOCK):
        mask = i < count - step * BLOCK
        change += tl.load(PART + 2 * (step * BLOCK + i), mask, 0.0)
        size += tl.load(PART + 2 * (step * BLOCK + i) + 1, mask, 0.0)
    total, whole = tl.sum(change), tl.sum(size)
    ratio = tl.where(whole == 0, float("inf"), total / tl.where(whole == 0, 1.0, whole))
    tl.store(OUT, tl.where(total == 0, 0.0, ratio))


relative_l1 = torch.library.custom_op("tessera::relative_l1", reference, mutates_args=())


@relative_l1.register_fake
def _fake(a, b):
    return a.new_empty((), dtype=torch.float64 if a.dtype == b.dtype == torch.float64 else torch.float32)


@on_gpu(relative_l1)
def launch(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """As reference, which serves fp64."""
    if torch.float64 in (a.dtype, b.dtype):
        return reference(a, b)
    _check(a, b)
    a, b = a.contiguous(), b.contiguous()
    count = triton.cdiv(a.numel(), BLOCK * STEPS)
    part, out = a.new_empty(count, 2, dtype=torch.float32), a.new_empty((), dtype=torch.float32)
    relative_parts[(count,)](a, b, part, a.numel(), BLOCK=BLOCK, STEPS=STEPS, num_warps=4)
    relative_total[(1,)](part, out, count, BLOCK=BLOCK, num_warps=4)
    return out


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """Two steps of one block output of FLUX width [1, tokens, 3072]."""
    b = torch.randn(1, tokens, 3072, device=device)
    return (b + 0.1 * torch.randn_like(b)).to(dtype), b.to(dtype)


def aot_specs() -> list[dict]:
    total = {"PART": "*fp32", "OUT": "*fp32", "count": "i32"}
    specs: list[dict] = [
        {"kernel": "relative_total", "args": total, "const": {"BLOCK": BLOCK}, "tag": "", "unaligned": ("count",)}
    ]
    for dtype in ("bf16", "fp32"):
        args = {"A": f"*{dtype}", "B": f"*{dtype}", "PART": "*fp32", "n": "i32"}
        const = {"BLOCK": BLOCK, "STEPS": STEPS}
        specs.append({"kernel": "relative_parts", "args": args, "const": const, "tag": dtype, "extra": dtype == "fp32"})
    return [spec | {"warps": 4, "stages": 3} for spec in specs]
