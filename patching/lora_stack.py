"""Several LoRA on one MODEL, weighed against each other layer by layer. What the weights come to is told to core's own
patches as their strengths, so that low VRAM, hooks, saving and quantized loaders work as with its Load LoRA."""

from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..methods.control.lora_gram import Weighed, cosines, norms, weigh
from .lora import Layer, Lora, layer_of, layers, tensor_of
from .sampling import Progress

WHERE = ("off", "shallow", "all")  # layers where LoRA are made orthogonal


@dataclass(frozen=True)
class Choice:
    """How LoRA are weighed."""

    target: str = "geomean"
    beta: float = 1.0
    orthogonalize: str = "off"
    shallow_fraction: float = 0.3

    @property
    def plain(self) -> bool:
        """Whether nothing but the strengths counts."""
        return (self.target == "none" or self.beta == 0) and self.orthogonalize == "off"

    def at(self, layer: Layer) -> bool:
        """Whether LoRA are made orthogonal in this layer."""
        return self.orthogonalize == "all" or (self.orthogonalize == "shallow" and layer.shallow(self.shallow_fraction))


Row = tuple[Layer, Weighed]


def weighed(model: Any, loras: list[Lora], strengths: list[float], choice: Choice, statistics: Any = None) -> list[Row]:
    """Every layer's weights; empty where all are 1."""
    if choice.plain or len(loras) < 2:
        return []
    rows = []
    progress = Progress(len({layer_of(key) for lora in loras for key in lora.patches}))
    for layer in layers(model, loras, statistics):
        rows.append((layer, weigh(layer.products, strengths, choice.target, choice.beta, choice.at(layer))))
        progress.step()
    return rows


def put(model: Any, clip: Any, loras: list[Lora], strengths: list[float], rows: list[Row]) -> tuple[Any, Any]:
    """Clones of both with the LoRA on them, in their order, as core's Load LoRA chained."""
    patched, worded = model.clone(), None if clip is None else clip.clone()
    factors = {layer.path: one.factors for layer, one in rows}
    for i, (lora, strength) in enumerate(zip(loras, strengths, strict=True)):
        patched.add_patches(lora.patches, strength)
        for tensor, count in Counter(tensor_of(key) for key in lora.patches).items():
            factor = factors.get(layer_of(tensor), (1.0,) * len(loras))[i]
            if factor != 1.0:
                held = patched.patches[tensor]
                patched.patches[tensor] = [*held[:-count], *((p[0] * factor, *p[1:]) for p in held[-count:])]
        if worded is not None and lora.text:
            worded.add_patches(lora.text, strength)
    return patched, worded


def told(loras: list[Lora], strengths: list[float], rows: list[Row], choice: Choice) -> dict[str, Any]:
    """JSON-ready: what became of every layer."""
    return {
        "loras": [{"name": lora.name, "strength": s} for lora, s in zip(loras, strengths, strict=True)],
        "norm_target": choice.target, "beta": choice.beta, "orthogonalize": choice.orthogonalize,
        "shallow_fraction": choice.shallow_fraction,
        "layers": [
            {
                "layer": layer.name, "block": layer.block, "norms": numbers(norms(layer.products)),
                "cosines": [numbers(row) for row in cosines(layer.products)], "factors": numbers(one.factors),
                "orthogonal": choice.at(layer) and not one.parallel and sum(layer.there) > 1,
            }
            for layer, one in rows
        ],
    }  # fmt: skip


def numbers(values: Any) -> list[float]:
    return [float(f"{float(v):.6g}") for v in values]


def lines(loras: list[Lora], strengths: list[float], rows: list[Row], choice: Choice, clip: Any) -> list[str]:
    """For the node's panel."""
    shared = [(layer, one) for layer, one in rows if sum(layer.there) > 1]
    if not rows:
        made = [f"{len(loras)} LoRA at their own strengths, as with core's Load LoRA"]
    else:
        turned = sum(choice.at(layer) and not one.parallel for layer, one in shared)
        made = [f"{len(loras)} LoRA in {len(rows)} layers, {len(shared)} of them shared; {turned} made orthogonal"]
    for i, (lora, strength) in enumerate(zip(loras, strengths, strict=True)):
        used = [strength * one.factors[i] for layer, one in rows if layer.there[i]]
        spread = f": {min(used):.3g} to {max(used):.3g}, median {median(used):.3g}" if used else ""
        made.append(f"{lora.name} at strength {strength:g}{spread}")
    made += feature_lines([layer for layer, _ in rows])
    parallel = sum(one.parallel for _, one in rows)
    kept = sum(any(layer.fixed) for layer, _ in rows)
    if parallel:
        made.append(
            f"{parallel} layers hold LoRA that point the same way, or opposite ways, and were not made orthogonal."
        )
    if kept:
        made.append(
            f"{kept} layers hold an adapter that is not linear in its strength (OFT, set, reshape), which stays."
        )
    return made + text_lines(loras, clip)


def feature_lines(found: list[Layer]) -> list[str]:
    """How many layers were measured on recorded inputs."""
    count = sum(layer.of_features for layer in found)
    return [f"{count} of {len(found)} layers measured by their effect on recorded inputs"] if count else []


def text_lines(loras: list[Lora], clip: Any) -> list[str]:
    """What became of the files' other keys."""
    made = []
    for lora in loras:
        if lora.text:
            made.append(f"{lora.name}: {len(lora.text)} layers of the text encoder patched at its plain strength")
        elif lora.unused_text and clip is None:
            made.append(
                f"{lora.name}: {lora.unused_text} tensors for a text encoder are left out; connect clip for them."
            )
        if lora.unknown:
            made.append(f"{lora.name}: {len(lora.unknown)} keys fit nothing here, such as {lora.unknown[0]}")
    return made
