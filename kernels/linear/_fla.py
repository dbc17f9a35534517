"""flash-linear-attention (package fla) as an optional backend: what its chunk kernels ask of their inputs. Nothing here
chooses it by itself; it is for whoever names it, and the rival to measure against."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

WIDEST = 256  # head dimension of queries and keys
LEAST = -100.0  # log gate, e^-100 is 0 in fp32; fla sums the logs of a chunk, which -inf would turn into NaN


def function(module: str, name: str) -> Callable[..., Any]:
    """fla.ops.<module>.<name>. Raises RuntimeError where fla is not installed."""
    try:
        return getattr(importlib.import_module(f"fla.ops.{module}"), name)
    except ImportError as e:
        raise RuntimeError("flash-linear-attention is not installed: pip install flash-linear-attention.") from e


def check(q: torch.Tensor) -> None:
    """Raises RuntimeError for queries [B, H, N, D] that fla's kernels do not take."""
    if q.device.type != "cuda" or q.element_size() > 2:
        raise RuntimeError(f"flash-linear-attention needs 16-bit tensors on a GPU, got {q.dtype} on {q.device}.")
    if q.shape[3] > WIDEST:
        raise RuntimeError(f"flash-linear-attention takes heads of up to {WIDEST}, got {q.shape[3]}.")


def rows(x: torch.Tensor) -> torch.Tensor:
    """[B, H, N, ...] <-> [B, N, H, ...], contiguous."""
    return x.transpose(1, 2).contiguous()


def gates(g: torch.Tensor) -> torch.Tensor:
    """Natural logarithms [B, H, N] as fla takes them: fp32 [B, N, H], finite."""
    return rows(g.float().clamp_min(LEAST))
