"""What tests of In-Context Panels share: the node, a look at the positions it makes, and those written by hand."""

import torch
from nodes_helper import run_node

from tessera.nodes.control.in_context_panels import InContextPanels

PANEL = {"flux": (1, 16, 8, 6), "flux2": (1, 128, 4, 3)}


def panels(model, latent=None, **inputs):
    """(MODEL, LATENT's samples, its mask)."""
    latent = {"samples": torch.zeros(PANEL["flux"])} if latent is None else latent
    patched, out = run_node(InContextPanels, model=model, latent=latent, **inputs).args
    return patched, out["samples"], out.get("noise_mask")


def spied(model):
    """(MODEL whose positions are kept as they reach the embedder, the list of them)."""
    seen, spy = [], model.clone()

    def keep(given):
        seen.append(given["img_ids"].clone())
        return given

    spy.set_model_post_input_patch(keep)
    return spy, seen


def by_hand(grid, clone, index, axis="width", axes=3, count=2):
    """Positions [tokens, axes], one token at a time."""
    _, high, wide = grid
    made = []
    for i in range(high):
        for j in range(wide):
            if axis == "width":
                p, size = j // (wide // count), wide // count
                at = (index[p], i, j % size + clone[p] * size)
            else:
                p, size = i // (high // count), high // count
                at = (index[p], i % size + clone[p] * size, j)
            made.append([*at, *[0] * (axes - 3)])
    return torch.tensor(made, dtype=torch.float32)


def made(model, latent, **inputs):
    """The LATENT that the node makes."""
    return run_node(InContextPanels, model=model, latent=latent, **inputs).args[1]
