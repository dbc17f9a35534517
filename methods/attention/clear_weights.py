"""The released weights of CLEAR (arXiv 2412.16112; Huage001/CLEAR on Hugging Face): attention projections that replace
those of FLUX.1-dev, under diffusers' names, and beside pooled keys the weights of the places in a patch.

    transformer_blocks.I.attn.{to_q,to_k,to_v,to_out.0}.{weight,bias}          image stream of the double blocks
    single_transformer_blocks.I.attn.{to_q,to_k,to_v}.{weight,bias}
    (either).I.attn.processor.spatial_weight [1, 1, 1, s, 1, s, 1]             in files named ..._down_s only
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"
PATCH_WEIGHT = "attn.processor.spatial_weight"
PROJECTIONS = {DOUBLE: ("to_q", "to_k", "to_v", "to_out.0"), SINGLE: ("to_q", "to_k", "to_v")}
NAME = re.compile(r"clear_local_(\d+)(?:_down_(\d+))?", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class ClearWeights:
    """projections: diffusers key -> tensor; patch_weights: block number in the stack -> fp32 [s, s]; radius and
    down_factor they were trained with, where the file says so (0: no pooled keys, None: not said)."""

    projections: Mapping[str, torch.Tensor]
    patch_weights: Mapping[int, torch.Tensor]
    radius: int | None
    down_factor: int | None


def expected(double: int, single: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every projection of a FLUX with that many blocks of that width."""
    return {
        f"{path}.{i}.attn.{name}.{end}": (hidden, hidden)[: 2 if end == "weight" else 1]
        for path, count in ((DOUBLE, double), (SINGLE, single))
        for i in range(count)
        for name in PROJECTIONS[path]
        for end in ("weight", "bias")
    }


def read(
    tensors: Mapping[str, torch.Tensor], double: int, single: int, hidden: int, name: str, metadata: Mapping[str, str]
) -> ClearWeights:
    """The content of a file, for a FLUX of that size. `name` of the file, and its metadata ("radius", "down_factor"),
    say what it was trained with. ValueError, one sentence, where a key or a shape does not fit."""
    if any(".lora_" in key for key in tensors):
        raise ValueError(f"{name} is a LoRA, not CLEAR's replacement weights. Load it with Load LoRA.")
    want = expected(double, single, hidden)
    places = {f"{p}.{i}.{PATCH_WEIGHT}": n for n, (p, i) in enumerate(_blocks(double, single))}
    pooled = {key: tensor for key, tensor in tensors.items() if key.endswith("spatial_weight")}
    size = next(iter(pooled.values())).shape[3:4].numel() if pooled else 0
    if pooled:
        want |= dict.fromkeys(places, (1, 1, 1, size, 1, size, 1))
    _fits(tensors, want, name, f"{double} + {single} blocks of width {hidden}")
    told = NAME.search(name)
    radius = metadata.get("radius") or (told[1] if told else None)
    down = size or metadata.get("down_factor") or (told[2] or 0 if told else None)
    return ClearWeights(
        {key: tensor for key, tensor in tensors.items() if key not in pooled},
        {places[key]: tensor.float().view(size, size) for key, tensor in pooled.items()},
        None if radius is None else _number(radius, "radius", name),
        None if down is None else _number(down, "down_factor", name),
    )


def _blocks(double: int, single: int) -> list[tuple[str, int]]:
    return [(DOUBLE, i) for i in range(double)] + [(SINGLE, i) for i in range(single)]


def _fits(tensors: Mapping[str, torch.Tensor], want: Mapping[str, tuple[int, ...]], name: str, model: str) -> None:
    for keys, words in ((want.keys() - tensors.keys(), "lacks"), (tensors.keys() - want.keys(), "also has")):
        if keys:
            some = f"{min(keys)!r}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
            raise ValueError(
                f"{name} does not hold CLEAR weights for this FLUX of {model}: it {words} {some}. "
                "Take a file of Huage001/CLEAR that was made for this model."
            )
    for key, shape in want.items():
        if tensors[key].shape != shape:
            raise ValueError(
                f"{name} does not fit this FLUX of {model}: {key} is {[*tensors[key].shape]}, needed is {[*shape]}."
            )


def _number(text: str | int, what: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} names its {what} as {text!r}, which is no whole number.") from None
