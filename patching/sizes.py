"""Sizes that a model's modules tell of themselves."""

from collections import Counter

import torch


def heads_of(model: torch.nn.Module) -> tuple[int, int]:
    """(heads, features of a head) of most modules that tell; (2, 128), as most large models have, where none does."""
    found: Counter = Counter()
    for module in model.modules():
        heads = next((n for a in ("num_heads", "heads", "n_heads") if type(n := getattr(module, a, None)) is int), None)
        width = next((n for a in ("head_dim", "dim_head") if type(n := getattr(module, a, None)) is int), None)
        total = next((n for a in ("hidden_size", "dim") if type(n := getattr(module, a, None)) is int), None)
        if heads and (width or total):
            found[heads, width or total // heads] += 1
    return found.most_common(1)[0][0] if found else (2, 128)
