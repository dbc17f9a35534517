"""The kernels of papers' authors as rivals. Their sources stay out of the pack, in the ignored folder .ref/ at its root:

    git clone https://github.com/thu-ml/SLA .ref/SLA
    git clone https://github.com/SingleZombie/LLSA .ref/LLSA

They are imported by path, as packages of names of our own, and nothing enters sys.path. Absent or broken sources raise;
the report then leaves that rival out and says so in one line (`Case.left_out`)."""

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rivals import Run

REF = Path(__file__).resolve().parents[1] / ".ref"
SOURCES = {"SLA": ("thu-ml/SLA", "sparse_linear_attention"), "LLSA": ("SingleZombie/LLSA", "src/llsa/kernel")}

Lists = Callable[[], tuple[torch.Tensor, ...]]


def load(name: str, *modules: str) -> list[Any]:
    """The modules, given with dots, below the folder of sources that `name` stands for."""
    repository, inside = SOURCES[name]
    folder = REF / name / inside
    if not folder.is_dir():
        raise FileNotFoundError(f"not here: git clone https://github.com/{repository} .ref/{name}")
    package = f"tessera_ref_{name.lower()}"
    if getattr(sys.modules.get(package), "__path__", None) != [str(folder)]:
        for stale in [key for key in sys.modules if key == package or key.startswith(f"{package}.")]:
            del sys.modules[stale]
        root = types.ModuleType(package)
        root.__path__ = [str(folder)]
        sys.modules[package] = root  # their own __init__ is not needed and not run
    return [importlib.import_module(f"{package}.{module}") for module in modules]


def sla(q, k, v, kept: float, block_m: int, block_n: int, weight, bias) -> tuple[Run, Lists]:
    """SLA's module on q, k, v [1, H, N, D], with the projection weight [D, D], bias [D] of the linear branch: the call,
    and the key blocks int32 [1, H, nQ, W] that it selects. Copies that it would make of strided heads are made here."""
    core, utils = load("SLA", "core", "utils")
    with torch.inference_mode(False):  # its parameters take part in a backward pass
        bf16 = q.dtype == torch.bfloat16  # else it computes in fp16
        module = core.SparseLinearAttention(q.shape[3], kept, "softmax", block_m, block_n, use_bf16=bf16).to(q.device)
        module.requires_grad_(False)
        module.proj_l.weight.copy_(weight)
        module.proj_l.bias.copy_(bias)
    q, k, v = (x.contiguous() for x in (q, k, v))

    def lists() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (utils.get_block_map(q, k, kept, block_m, block_n)[1].sort(-1).values.int(),)

    return lambda: module(q, k, v), lists


def llsa(q, k, v, topk: int, block: int) -> tuple[Run, Lists]:
    """LLSA with two levels on q, k, v [1, H, N, D]: the call, and (idx int32 [1, H, N_1 + N_2, topk], means of the keys
    and of the values [1, H, N_1 + N_2, D]) as hierarchical_sparse takes them."""
    modules = "torch_op.flash_sparse_attention_res_2", "triton.topk", "triton.mean_pool"
    attention, top, mean = load("LLSA", *modules)
    q, k, v = (x.contiguous() for x in (q, k, v))

    def lists() -> tuple[torch.Tensor, ...]:
        fine = [mean.mean_pool1d(x, block) for x in (q, k, v)]
        coarse = [mean.mean_pool1d(x, block) for x in fine]
        above = top.gen_sparse_indices(coarse[0], coarse[1], topk)
        chosen = top.compute_topk_indices_sparse(fine[0], fine[1], above, topk, topk, block)
        both = torch.cat((chosen.int(), above.int()), 2).sort(-1).values
        return both, torch.cat((fine[1], coarse[1]), 2), torch.cat((fine[2], coarse[2]), 2)

    return lambda: attention.llsa_l2(q, k, v, topk, topk, block), lists
