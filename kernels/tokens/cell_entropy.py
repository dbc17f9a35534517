"""Entropy of what a cell holds, by kernel density (D2iT, arXiv 2504.09454, after its description; no official code):

    p[j] = mean over i of exp(-(x[i] - b[j])^2 / (2 sigma^2)),  p / sum p,  E = -sum p log p / log bins

b: so many bins evenly from 0 to 1. 0 for a value that all share, towards 1 for values spread over the range.
"""

import math

import torch

from .._triton import on_gpu, tl, triton

SIZES = ["S", "xr"]
_jit = triton.jit(do_not_specialize=SIZES) if hasattr(triton, "__version__") else triton.jit


def check(x: torch.Tensor, bins: int, sigma: float) -> None:
    if x.ndim != 2 or not x.is_floating_point() or x.shape[1] < 1:
        raise ValueError(f"Cells must be floating point [R, S], got {[*x.shape]} {x.dtype}.")
    if bins < 2 or not sigma * (bins - 1) >= 0.25:
        raise ValueError(
            f"{bins} bins with sigma {sigma} leave values between bins unseen: take at least 2 bins and sigma of at least "
            "a quarter of their distance."
        )


def reference(x: torch.Tensor, bins: int = 64, sigma: float = 0.01) -> torch.Tensor:
    """x [R, S], S values from 0 to 1 of each cell, values beyond are set to the ends -> [R] fp32 in 0..1."""
    check(x, bins, sigma)
    places = torch.arange(bins, device=x.device, dtype=torch.float32) / (bins - 1)
    total = torch.zeros(x.shape[0], bins, device=x.device)
    for values in x.float().clamp(0, 1).unbind(1):
        total += torch.exp((values[:, None] - places).square() * (-0.5 / sigma**2))
    p = total / total.sum(1, keepdim=True)
    return -(p * p.clamp_min(1e-30).log()).sum(1) / math.log(bins)


cell_entropy = torch.library.custom_op("tessera::cell_entropy", reference, mutates_args=())


@cell_entropy.register_fake
def _fake(x, bins=64, sigma=0.01):
    return x.new_empty(x.shape[0], dtype=torch.float32)


@_jit
def entropy_kernel(X, Y, S, xr, xs, scale, step, over, BINS: tl.constexpr, BB: tl.constexpr):
    """One program a cell; BB >= BINS a power of two."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BB)
    total = tl.zeros([BB], tl.float32)
    for i in range(S):
        value = tl.load(X + row * xr + i * xs).to(tl.float32)
        value = tl.minimum(tl.maximum(value, 0.0), 1.0)
        away = value - j * step
        total += tl.exp(away * away * scale)
    total = tl.where(j < BINS, total, 0.0)
    p = total / tl.sum(total, 0)
    tl.store(Y + row, -tl.sum(p * tl.log(tl.maximum(p, 1e-30)), 0) * over)


@on_gpu(cell_entropy)
def launch(x: torch.Tensor, bins: int = 64, sigma: float = 0.01) -> torch.Tensor:
    """As reference."""
    check(x, bins, sigma)
    y = x.new_empty(x.shape[0], dtype=torch.float32)
    if y.numel():
        entropy_kernel[(x.shape[0],)](
            x, y, x.shape[1], *x.stride(), -0.5 / sigma**2, 1 / (bins - 1), 1 / math.log(bins),
            BINS=bins, BB=triton.next_power_of_2(bins), num_warps=1,
        )  # fmt: skip
    return y


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """A cell for each token: 16 channels of 4 x 4 latent pixels."""
    return torch.rand(tokens, 256, device=device).to(dtype), 64, 0.01


def aot_specs() -> list[dict]:
    args = {
        "X": "*fp32",
        "Y": "*fp32",
        "S": "i32",
        "xr": "i64",
        "xs": "i64",
        "scale": "fp32",
        "step": "fp32",
        "over": "fp32",
    }
    spec = {"kernel": "entropy_kernel", "args": args, "const": {"BINS": 64, "BB": 64}, "tag": "fp32", "warps": 1}
    return [spec | {"stages": 3, "unaligned": (*SIZES, "xs"), "extra": False}]
