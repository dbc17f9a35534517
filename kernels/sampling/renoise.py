"""Renoise: a flow's prediction, and from it the latent at an earlier noise level, y = (1 - t) x0 + t e with x0 = x - s v.

What few-step and block-causal models do between two steps (DMD2, arXiv 2405.14867; Self-Forcing, arXiv 2506.08009): to the
clean latent, then fresh noise e in the share t. Without a velocity v, x is the clean latent already.

Bandwidth bound: x, v and e are read once, the result is written once, in one launch instead of three to five. Everything is
computed in fp32; at t = 0 without a velocity x is copied bit for bit.
"""

import torch

from .._triton import on_gpu, tl, triton

BLOCK = 1024  # elements a program; 4 warps then load 16 bytes of bf16 a thread


def _check(x: torch.Tensor, velocity: torch.Tensor | None, noise: torch.Tensor) -> None:
    for name, other in (("velocity", velocity), ("noise", noise)):
        if other is not None and (other.shape, other.device) != (x.shape, x.device):
            raise ValueError(
                f"renoise needs x and {name} of one shape and device, got {[*x.shape]} on {x.device} and {[*other.shape]} on "
                f"{other.device}."
            )
    if not x.is_floating_point():
        raise ValueError(f"renoise needs a floating point dtype, got {x.dtype}; convert the latent first.")


def reference(
    x: torch.Tensor, velocity: torch.Tensor | None, noise: torch.Tensor, sigma: float, following: float
) -> torch.Tensor:
    """x, velocity, noise [...] -> the latent at noise level `following`, a new contiguous tensor [...] of x's dtype. sigma: the
    level of x; without a velocity it is not used. Computes in fp32, fp64 in fp64. ValueError where shapes or devices differ."""
    _check(x, velocity, noise)
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    clean = x.to(exact) if velocity is None else x.to(exact) - sigma * velocity.to(exact)
    out = (1 - following) * clean + following * noise.to(exact)
    return out.to(x.dtype).contiguous()


@triton.jit
def _renoise_kernel(
    OUT, X, V, E, sigma, following, n,
    VELOCITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """OUT = (1 - following) (X - sigma V) + following E; without VELOCITY V is not read."""
    start = tl.program_id(0).to(tl.int64) * BLOCK  # the tensors may hold more than 2^31 elements
    i = tl.arange(0, BLOCK)
    mask = i < n - start
    clean = tl.load(X + start + i, mask, 0.0).to(tl.float32)
    if VELOCITY:
        clean -= sigma * tl.load(V + start + i, mask, 0.0).to(tl.float32)
    y = (1.0 - following) * clean + following * tl.load(E + start + i, mask, 0.0).to(tl.float32)
    tl.store(OUT + start + i, y.to(OUT.dtype.element_ty), mask)


renoise = torch.library.custom_op("tessera::renoise", reference, mutates_args=())
renoise.register_fake(lambda x, velocity, noise, sigma, following: torch.empty(x.shape, dtype=x.dtype, device=x.device))


@on_gpu(renoise)
def launch(
    x: torch.Tensor, velocity: torch.Tensor | None, noise: torch.Tensor, sigma: float, following: float
) -> torch.Tensor:
    """As reference, which serves fp64."""
    _check(x, velocity, noise)
    if x.dtype == torch.float64:
        return reference(x, velocity, noise, sigma, following)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        x, noise = x.contiguous(), noise.contiguous()
        v = x if velocity is None else velocity.contiguous()
        _renoise_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            out, x, v, noise, sigma, following, out.numel(), VELOCITY=velocity is not None, BLOCK=BLOCK, num_warps=4
        )
    return out


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """A block of Wan's latent [1, 16, T, 60, 104] with about so many tokens, half way down."""
    frames = max(1, tokens // 1560)
    x, velocity, noise = (torch.randn(1, 16, frames, 60, 104, device=device).to(dtype) for _ in range(3))
    return x, velocity, noise, 0.75, 0.5


def aot_specs() -> list[dict]:
    """What ahead-of-time compilation checks: a latent in fp32 and in bf16, with a velocity and without."""
    specs = []
    for dtype in ("fp32", "bf16"):
        for velocity in (False, True):
            args = dict.fromkeys(["OUT", "X", "V", "E"], f"*{dtype}") | {
                "sigma": "fp32",
                "following": "fp32",
                "n": "i32",
            }
            specs.append({
                "kernel": "_renoise_kernel", "args": args, "const": {"VELOCITY": velocity, "BLOCK": BLOCK}, "warps": 4,
                "stages": 3, "tag": f"{dtype}{' velocity' if velocity else ''}", "per_target": {}, "expect": {},
                "extra": dtype == "bf16",
            })  # fmt: skip
    return specs
