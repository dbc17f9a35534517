"""Sizes that a model's modules tell of themselves."""

import hashlib
from collections import Counter
from typing import Any

import torch

from .. import archs
from .weights import unpatched


def heads_of(model: torch.nn.Module) -> tuple[int, int]:
    """(heads, features of a head) of most modules that tell; (2, 128), as most large models have, where none does."""
    found: Counter = Counter()
    for module in (module for module in model.modules() if archs.original(module) is module):  # each once
        heads = next((n for a in ("num_heads", "heads", "n_heads") if type(n := getattr(module, a, None)) is int), None)
        width = next((n for a in ("head_dim", "dim_head") if type(n := getattr(module, a, None)) is int), None)
        total = next((n for a in ("hidden_size", "dim") if type(n := getattr(module, a, None)) is int), None)
        if heads and (width or total):
            found[heads, width or total // heads] += 1
    return found.most_common(1)[0][0] if found else (2, 128)


def compute_dtype(patcher: Any) -> torch.dtype:
    """What a MODEL computes in. Before it is loaded its network can still wear what another clone set."""
    return patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype()


def holds_compiled(patcher: Any) -> bool:
    """Whether object patches put the network, or modules of it, through torch.compile."""
    return any(archs.original(part) is not part for part in patcher.object_patches.values())


def fingerprint(model: Any) -> str:
    """Names and shapes of the weights of a MODEL (or of a network) and a few values of the biases and scales, as 16
    hexadecimal digits: the same file gives the same ones in another process, in bfloat16 or above, and under a LoRA, loaded
    or not, of this MODEL or of another clone."""
    patcher = model if hasattr(model, "get_model_object") else None
    network = model if patcher is None else patcher.get_model_object("diffusion_model")
    digest = hashlib.sha256()
    named = {plain_name(name): weight for name, weight in network.state_dict().items()}
    for name, weight in sorted(named.items()):
        digest.update(f"{name} {tuple(weight.shape)} ".encode())
        if weight.is_floating_point() and weight.numel() and weight.dim() == 1:
            before = None if patcher is None else unpatched(patcher, f"diffusion_model.{name}")
            flat = (weight if before is None else before).detach().reshape(-1)
            places = torch.linspace(0, flat.numel() - 1, 4, dtype=torch.float64).long().to(flat.device)
            digest.update(str([f"{v:.2e}" for v in flat[places].to(torch.bfloat16).float().tolist()]).encode())
    return digest.hexdigest()[:16]


def plain_name(name: str) -> str:
    """Of a weight or module, wherever something of it was compiled."""
    return name.replace("_orig_mod.", "")
