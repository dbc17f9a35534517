"""Each attention method as a model meets it: its whole `attend` on one call, with selection, reordering and the way back,
against dense attention. The plan of the layout is made before, as for every call of a run but the first."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import rivals
import torch
from case import Case
from operators import heads

from tessera.archs import Layout
from tessera.methods.attention.call import AttentionCall
from tessera.methods.attention.diagonal import Diagonal
from tessera.methods.attention.linear import LinearAttention
from tessera.methods.attention.local_window import LocalWindow
from tessera.methods.attention.log_linear_sparse import LogLinearSparse
from tessera.methods.attention.rettention import Rettention
from tessera.methods.attention.sparse_linear import SparseLinear
from tessera.methods.attention.tile import Tile
from tessera.methods.attention.window_3d import Window3D

SIZES = {"cpu": ((64, 64), (64, 128)), "cuda": ((64, 128), (128, 256))}  # tokens, height and width
FRAMES = 16  # of a clip of as many tokens, for the method that leaves pictures alone
SHAPE = {"cpu": (4, 64), "cuda": (24, 128)}  # heads, width

# Each node's defaults, and sparser settings of three of them that much larger pictures are worth.
METHODS: dict[str, Any] = {
    "Sparse-Linear Attention, topk 0.5": SparseLinear(),
    "Sparse-Linear Attention, topk 0.1": SparseLinear(topk=0.1),
    "Log-Linear Sparse Attention, density 0.25": LogLinearSparse(exclude_selected=True),
    "Log-Linear Sparse Attention, topk 8": LogLinearSparse(topk=8, exclude_selected=True),
    "Local Window Attention, radius 16": LocalWindow(),
    "Local Window Attention, radius 8, down_factor 4": LocalWindow(radius=8, down_factor=4),
    "Window Attention 3D, 8 x 16 x 16": Window3D(),
    "Diagonal Attention, block 256": Diagonal(block=256),
    "Attention Tile, 4 of 16 frames": Tile(ref_frames=4),
    "Rettention, density 0.0625, a reuse": Rettention(),
    "Linear Attention, relu": LinearAttention(allow_untrained=True),
}


def cases(device: str) -> Iterator[Case]:
    """No truth: the tests hold each method to dense attention over its own pairs."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for grid in SIZES[device]:
        tokens = grid[0] * grid[1]
        q, k, v = heads(tokens, *SHAPE[device], device, dtype)
        for title, method in METHODS.items():
            clip = isinstance(method, Tile)
            t, h, w = shape = (FRAMES, grid[0] // 4, grid[1] // 4) if clip else (1, *grid)
            attend, share = prepared(method, q, k, v, shape)
            sizes = f"{tokens} tokens ({t} x {h} x {w}), {q.shape[1]} x {q.shape[3]}, {str(dtype)[6:]}"
            yield Case("methods", f"{title}, {sizes}", attend, None, 0.0, rivals.dense(q, k, v, device),
                       facts={"computed": share})  # fmt: skip


def prepared(method: Any, q, k, v, grid: tuple[int, int, int]):
    """(a call of `attend` in the middle of a run, the share of dense attention's pairs that it computes)."""
    clock = SimpleNamespace(step=0, sigma=1.0, percent=0.0, evaluation=0, evaluations_a_step=1, series=0, restarts=0)
    forward = SimpleNamespace(run=SimpleNamespace(clock=clock), keys=(0,), calls={})
    layout = Layout(grid, slice(0, q.shape[2]), q.shape[2])
    block = SimpleNamespace(number=0, count=2)
    call = AttentionCall(q, k, v, None, q.shape[3] ** -0.5, "self", layout, block, forward)
    state = method.begin()
    for clock.evaluation in range(getattr(method, "phases", 1)):  # one that remembers is timed at what it does mostly
        answer = method.attend(state, call)
    return lambda: method.attend(state, call), answer.pairs / answer.dense_pairs
