"""Graft files: what was trained to stand in for attention in some blocks of a model.

safetensors with keys graft.{list of blocks}.{index}.{parameter} and metadata format = graft_v1, op, arch (the name of
the architecture), hparams (JSON: settings of the operator, which win over the node's). Parameters of op `linear`:

    dwc.weight [C or D, 1, K, K], dwc.bias [C or D]    depthwise convolution of the values, per channel or shared by heads
    proj_q.weight, proj_k.weight [H, D, D']            rows before the feature map (hedgehog)
    gamma [H]                                          factor of each head's result (rms)
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

import torch

from ..weight_files import read_weights

KEY = re.compile(r"graft\.(.+?)\.(\d+)\.(.+)")
FORMAT = "graft_v1"
PARAMETERS = {"dwc.weight": 4, "dwc.bias": 1, "proj_q.weight": 3, "proj_k.weight": 3, "gamma": 1}  # name: dimensions
HPARAMS = ("feature_map", "normalizer", "eps", "heads", "rope", "text")


@dataclass(frozen=True, eq=False)
class Graft:
    """blocks: {(list, index): {parameter: tensor}}."""

    arch: str
    op: str
    hparams: dict[str, Any]
    blocks: dict[tuple[str, int], dict[str, torch.Tensor]] = field(repr=False)


def load(path: str, op: str = "linear") -> Graft:
    """The graft of that operator. ValueError in one sentence for any other file."""
    tensors, told = read_weights(path, "train or download it again")
    if told.get("format") != FORMAT or told.get("op") != op:
        found = f"format {told.get('format')!r} and op {told.get('op')!r}"
        raise ValueError(f"{path} is no graft for this node: it has {found}, wanted are {FORMAT!r} and {op!r}.")
    blocks: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        match = KEY.fullmatch(key)
        if not match or PARAMETERS.get(match[3]) != value.ndim:
            raise ValueError(f"{path}: {key} {[*value.shape]} is no parameter of a linear graft: {[*PARAMETERS]}.")
        blocks.setdefault((match[1], int(match[2])), {})[match[3]] = value
    if not blocks:
        raise ValueError(f"{path} holds no weights.")
    hparams = _hparams(path, told.get("hparams", "{}"))
    unknown = sorted(set(hparams) - set(HPARAMS))
    if unknown:
        raise ValueError(f"{path}: unknown setting {unknown[0]!r} in its hparams; known are {', '.join(HPARAMS)}.")
    return Graft(told.get("arch", ""), op, hparams, blocks)


def _hparams(path: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
        fits = all(
            type(v) is (int if k == "heads" else float if k == "eps" else str) for k, v in found.items() if k in HPARAMS
        )
    except (ValueError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(
            f"{path}: its hparams must be words by name, heads a number and eps a fraction; got {text[:60]!r}."
        )
    return found
