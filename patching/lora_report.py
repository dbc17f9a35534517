"""How much LoRA get in each other's way: cosines of their deltas and their norms, layer by layer."""

from dataclasses import dataclass
from typing import Any

import torch

from ..methods.control.lora_gram import cosines, norms
from ..methods.measure.heat_map import heat_map
from .lora import Layer, Lora, layer_of, layers
from .lora_stack import feature_lines, numbers
from .sampling import Progress

MOST_ROWS = 96  # layers above which a picture shows blocks
THIRDS = ("shallow", "middle", "deep")


@dataclass(frozen=True)
class Row:
    """A layer, or all layers of a block."""

    name: str
    products: torch.Tensor  # fp64 [k, k]
    there: tuple[bool, ...]


def measure(model: Any, loras: list[Lora], statistics: Any = None) -> list[Layer]:
    progress = Progress(len({layer_of(key) for lora in loras for key in lora.patches}))
    made = []
    for layer in layers(model, loras, statistics, measured=True):
        made.append(layer)
        progress.step()
    return made


def blocks(found: list[Layer]) -> list[Row]:
    """Whole blocks: the deltas of their layers as one vector, so that products add up."""
    made: dict[str, Row] = {}
    for layer in found:
        name = "outside" if layer.block is None else str(layer.block)
        row = made.get(name, Row(name, torch.zeros_like(layer.products), (False,) * len(layer.there)))
        there = tuple(a or b for a, b in zip(row.there, layer.there, strict=True))
        made[name] = Row(name, row.products + layer.products, there)
    return list(made.values())


def pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i + 1, count)]


def overlap(row: Any, i: int, j: int) -> float | None:
    """The cosine of two LoRA; None where one of them leaves the layer as it is."""
    n = norms(row.products)
    return float(cosines(row.products)[i, j]) if n[i] > 0 and n[j] > 0 else None


def mean(found: list[Layer], i: int, j: int) -> float | None:
    """Mean |cosine| over the layers that both patch."""
    values = [abs(c) for c in (overlap(layer, i, j) for layer in found) if c is not None]
    return sum(values) / len(values) if values else None


def thirds(found: list[Layer]) -> list[list[Layer]]:
    """The layers of the shallow, middle and deep third of the blocks."""
    inside = [layer for layer in found if layer.block is not None]
    return [[layer for layer in inside if 3 * (layer.block or 0) // layer.blocks == third] for third in range(3)]


def told(loras: list[Lora], found: list[Layer]) -> dict[str, Any]:
    """JSON-ready. Norms and cosines are of the deltas at strength 1."""
    return {
        "loras": [lora.name for lora in loras],
        "pairs": [
            {"pair": [i + 1, j + 1], "mean": _short(mean(found, i, j)),
             **{name: _short(mean(part, i, j)) for name, part in zip(THIRDS, thirds(found), strict=True)}}
            for i, j in pairs(len(loras))
        ],
        "layers": [
            {"layer": layer.name, "block": layer.block, "norms": numbers(norms(layer.products)),
             "cosines": [numbers(row) for row in cosines(layer.products)]}
            for layer in found
        ],
    }  # fmt: skip


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def lines(loras: list[Lora], found: list[Layer]) -> list[str]:
    """For the node's panel: a table of pairs and of norms."""
    made = [f"{len(loras)} LoRA, {len(found)} layers; {sum(sum(x.there) > 1 for x in found)} of them shared"]
    for i, lora in enumerate(loras):
        sizes = [float(norms(layer.products)[i]) for layer in found if layer.there[i]]
        whole = sum(size**2 for size in sizes) ** 0.5
        made.append(f"{i + 1}: {lora.name}, {len(sizes)} layers, norm {whole:.4g}, in a layer up to {max(sizes):.4g}")
    for i, j in pairs(len(loras)):
        values = (mean(part, i, j) for part in (found, *thirds(found)))
        words = ("|cos|", *THIRDS)
        parts = [f"{word} {'-' if v is None else f'{v:.4f}'}" for word, v in zip(words, values, strict=True)]
        made.append(f"{i + 1}-{j + 1}: " + ", ".join(parts))
    return made + feature_lines(found)


def picture(loras: list[Lora], found: list[Layer], rows: str) -> torch.Tensor:
    """Heat map [1, H, W, 3]: a row for each layer or block, a column for each pair, the norms beside."""
    by_block = rows == "blocks" or (rows == "auto" and len(found) > MOST_ROWS)
    shown: list[Any] = blocks(found) if by_block else found
    title = [f"{i + 1}: {lora.name}" for i, lora in enumerate(loras)]
    title.append("cosine of the deltas: green 0, red 1 or -1")
    columns = pairs(len(loras))
    table = [
        (
            row.name,
            [overlap(row, i, j) for i, j in columns],
            "  ".join(f"{n:.3g}" for n in norms(row.products).tolist()),
        )
        for row in shown
    ]
    names = [f"{i + 1}-{j + 1}" for i, j in columns]
    return heat_map(title, "block" if by_block else "layer", names, table, "norms", shade=lambda c: 1 - abs(c))
