"""What the machine can do at most, measured before anything is compared with it."""

import time
from collections.abc import Callable

import torch
from timing import timed


def best(run: Callable[[], object], device: str, seconds: float = 0.5) -> float:
    """Seconds of the fastest call."""
    run()
    end, fastest = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < end:
        fastest = min(fastest, timed(run, device, None))
    return fastest / 1000


def ceilings(device: str) -> dict[str, float]:
    """GB/s of a copy (bytes read and written), GB/s of summing a buffer that stays in the last cache, and TFLOP/s of a
    square matrix product by dtype. Random numbers: zeros draw less power and run faster than work does."""
    gpu = device == "cuda"
    source = torch.randn(1 << 29 if gpu else 1 << 25, device=device)
    target = torch.empty_like(source)
    copy = best(lambda: target.copy_(source), device)
    found = {"copy GB/s": 2 * source.nbytes / copy / 1e9}
    small = torch.randn((32 << 20) // 4 if gpu else (1 << 20) // 4, device=device)
    found["cache GB/s"] = small.nbytes / best(lambda: small.sum(), device) / 1e9
    side = 8192 if gpu else 1024
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if gpu else (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        found[f"{str(dtype)[6:]} TFLOP/s"] = 2 * side**3 / best(lambda a=a, b=b: a @ b, device) / 1e12
    return {name: round(value, 3) for name, value in found.items()}
