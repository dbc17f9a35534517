"""One call of an attention method on small made-up inputs, so that its kernels are compiled before they are needed."""

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import torch

from ...archs import Layout
from ...kernels import _offline
from .call import AttentionCall, Decline

SIDE = 40  # image tokens a side: more than a block of any kernel, little work for the references
GRIDS = (1, SIDE, SIDE), (16, SIDE // 4, SIDE // 4)  # a picture, and a clip for methods that leave pictures alone


def rehearse(method: Any, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Lets the method serve a picture of SIDE x SIDE tokens after 16 text tokens, in token-major memory as models
    hand it over; a clip of as many tokens where it declines the picture. Decline where it takes neither."""
    text, total = 16, 16 + SIDE * SIDE
    sizes = heads, kv_heads, kv_heads
    q, k, v = (torch.randn(1, total, n, head_dim).to(dtype).transpose(1, 2) for n in sizes)
    clock = SimpleNamespace(step=0, sigma=1.0, percent=0.0, evaluation=0, evaluations_a_step=1, series=0, restarts=0)
    forward = SimpleNamespace(run=SimpleNamespace(clock=clock), keys=(0,), calls={})
    block = SimpleNamespace(number=0, count=1)
    for grid in GRIDS:
        layout = Layout(grid, slice(text, total), total)
        call = AttentionCall(q, k, v, None, head_dim**-0.5, "self", layout, block, forward)
        state = method.begin()
        try:
            for clock.evaluation in range(getattr(method, "phases", 1)):  # a method that remembers does other work then
                method.attend(state, call)
        except Decline:
            if grid == GRIDS[-1]:
                raise
        else:
            return


def main(job: dict[str, Any]) -> None:
    """job: module (below the pack), name and settings of the method; heads, kv_heads, head_dim, dtype; target and table
    of the GPU. Writes the names of the kernels that are ready to stdout."""
    root = __package__.rsplit(".", 2)[0]
    method = getattr(importlib.import_module(f"{root}.{job['module']}"), job["name"])(**job["settings"])
    shape = job["heads"], job["kv_heads"], job["head_dim"], getattr(torch, job["dtype"])
    torch.set_num_threads(1)
    with torch.inference_mode():
        ready = _offline.compile_for(tuple(job["target"]), job["table"], lambda: rehearse(method, *shape))
    sys.stdout.write(" ".join(ready))
