"""Launches the kernels of _delta_kernels.py, and names what ahead-of-time compilation checks of them."""

from typing import Any

import torch

from .._config import left_out
from .._triton import triton
from ..attention._tiles import split_head
from ._delta_kernels import delta_carry, delta_inverse, delta_prepare, delta_taken
from ._delta_passes import gates
from ._ssd_kernels import ssd_out  # noqa: F401 - bench/aot.py finds the kernel of a spec by name in this module
from ._ssd_launch import BITS, MMA, chunk_of, kinds, out_args, outputs, ready, sizes, spec, vectors, width

LONGEST = 128  # head size: a state of more rows leaves a program no room for a tile of tokens


def serves(q: torch.Tensor) -> bool:
    return q.dtype != torch.float64 and q.shape[3] <= LONGEST


def _carry(d: int, e: int, bits: int) -> dict[str, int]:
    """Constants of delta_carry: fp32 products hold their operands in registers, so no tile has more than 64 rows."""
    d0, d1 = split_head(d)
    if bits == 32 and d0 > 64:
        d0, d1 = 64, d0 - 64
    return {
        "D": d,
        "E": e,
        "L": chunk_of(bits),
        "D0": d0,
        "D1": d1,
        "BE": min(16 if bits == 32 else 32, width(e, bits)),
    }


def _prepare(e: int, bits: int) -> dict[str, int]:
    chunk = chunk_of(bits)
    return {"E": e, "L": chunk, "BK": chunk if bits == 16 else 16, "BE": width(e, bits)}


def _products(t: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """T (weight x) of every chunk, [B, H, N, E] contiguous in x's dtype."""
    (batch, heads, n, e), chunks = x.shape, t.shape[2]
    out = x.new_empty(batch, heads, n, e)
    const = _prepare(e, 8 * x.element_size())
    delta_prepare[(chunks * triton.cdiv(e, const["BE"]), heads, batch)](
        t, x, weight, out, n, chunks, heads, *x.stride()[:3], num_warps=4, num_stages=1, **const
    )
    return out


def _inverses(k: torch.Tensor, beta: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """T of every chunk [B, H, C, L, L], fp32; beta [B, H, C L]."""
    (batch, heads, n, d), bits = k.shape, 8 * k.element_size()
    chunk = chunk_of(bits)
    chunks = beta.shape[2] // chunk
    taken = k.new_empty(batch, heads, chunks, chunk, chunk, dtype=torch.float32)
    t = torch.empty_like(taken)
    delta_taken[(chunks, heads, batch)](
        k, beta, high, low, taken, n, chunks, heads, *k.stride()[:3],
        D=d, L=chunk, BD=width(d, bits), num_warps=4, num_stages=1,
    )  # fmt: skip
    delta_inverse[(batch * heads * chunks,)](taken, t, L=chunk, num_warps=4)
    return t


def forward(q, k, v, beta, g, state, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As _delta_passes.forward."""
    (batch, heads, n, d), e, bits, like = q.shape, v.shape[3], 8 * q.element_size(), v
    q, k, v = (ready(x) for x in (q, k, v))
    chunk = chunk_of(bits)
    high, low, enter, leave, total = vectors((gates(g, q, chunk, torch.float32),))
    weight = torch.nn.functional.pad(beta.float(), (0, enter.shape[3] - n))
    t = _inverses(k, weight, high, low)
    own, per = _products(t, v, weight), _products(t, k, weight * enter[0])
    states = q.new_empty(1, batch, heads, t.shape[2], d, e, dtype=torch.float32)
    written, last = torch.empty_like(own), q.new_empty(batch, heads, d, e, dtype=torch.float32)
    const = _carry(d, e, bits)
    delta_carry[(triton.cdiv(e, const["BE"]), heads, batch)](
        k, per, own, leave, total, last if state is None else state.contiguous(), states, written, last,
        n, t.shape[2], heads, *k.stride()[:3], STARTED=state is not None, num_warps=4, num_stages=1, **const,
    )  # fmt: skip
    return outputs(q, k, written, high, low, enter, states, scale, "forward", 1, like), last


SMALL = {(64, 64): 64, (96, 72): 72, (128, 128): 128}  # compiled at every run, each on some GPUs
SHAPES = [(64, 64), (128, 128), (32, 32), (96, 72), (128, 64), (16, 16)]


def aot_specs() -> list[dict]:
    """Compilations for bench/aot.py."""
    made = []
    for dtype in ("bf16", "fp16", "fp32"):
        bits = BITS[dtype]
        chunk = chunk_of(bits)
        inverse = kinds("", "A T", "", "", dtype)
        made.append(spec("delta_inverse", inverse, {"L": chunk}, f"{chunk} tokens {dtype}", extra=dtype != "bf16"))
        for d, e in SHAPES:
            tag = f"d{d} e{e} {dtype}"
            more: dict[str, Any] = {"extra": left_out(SMALL[d, e], 1) if dtype == "bf16" and (d, e) in SMALL else True}
            more["expect"] = MMA if bits == 16 and min(d, e) >= 64 else {}
            args = kinds("K", "BETA HIGH LOW A", "kb kh", "N C HEADS kn", dtype)
            made.append(spec("delta_taken", args, {"D": d, "L": chunk, "BD": width(d, bits)}, tag, **more))
            args = kinds("X OUT", "T WEIGHT", "xb xh", "N C HEADS xn", dtype)
            made.append(spec("delta_prepare", args, _prepare(e, bits), tag, **more))
            args = kinds("K PER OWN W", "LEAVE TOTAL START STATES LAST", "kb kh", "N C HEADS kn", dtype)
            const = _carry(d, e, bits)
            made.append(spec("delta_carry", args, const | {"STARTED": 1}, tag, **more))
            const = {**sizes(d, e, bits), "GROUP": 1, "DIRECTION": 0, "DIAGONAL": 1}
            made.append(spec("ssd_out", out_args(dtype), const, f"delta {tag}", **more | {"stages": 2, "extra": True}))
    return made
