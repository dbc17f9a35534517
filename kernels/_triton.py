"""Triton where it is installed. Elsewhere a stand-in, so kernel files import and their references serve."""

from types import SimpleNamespace

try:
    import triton
    import triton.language as tl
except ImportError:
    tl = SimpleNamespace(constexpr=object)
    triton = SimpleNamespace(jit=lambda fn: fn)


def on_gpu(op):
    """Decorator: this launcher serves `op` on CUDA and ROCm; every other device keeps the reference."""
    return op.register_kernel("cuda") if hasattr(triton, "__version__") else lambda launch: launch


_rehearsing: list[bool] = []  # not empty in a process that only compiles, see _offline.py


def gathers(device) -> bool:
    """Whether this device is better served by gathering on the host side than by the tiles of the GPU kernels."""
    return device.type == "cpu" and not _rehearsing
