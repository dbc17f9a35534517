"""The released weights of RelaCtrl (arXiv 2502.14377; qihoo360/RelaCtrl on Hugging Face), for PixArt-alpha of width D = 1152.

controlnet.N.before_proj|after_proj.{weight [D, D], bias [D]}                  N = 0 .. 10
controlnet.N.process.scale_shift_table [6, D]
controlnet.N.process.experts_attn.G.attn.qkv.{weight [3 d, d], bias [3 d]}     G = 0 .. D / d - 1
controlnet.N.process.experts_attn.G.attn.proj.{weight [d, d], bias [d]}
base_model.*                                                                   PixArt's own weights, where they are inside
"""

import re
from collections import Counter
from collections.abc import Mapping

import torch

from .relactrl import HEADS, PLACES, ControlBlock, Pair, RelaCtrl

CONTROL, BASE = "controlnet.", "base_model."
WIDE = r"controlnet\.\d+\.(before|after)_proj\.bias"
SHOWN = 30  # names in one sentence
Shape = tuple[int | None, ...]  # None: any size


def expected(width: int, groups: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every control tensor: that many groups of channels in each block."""
    shapes: dict[str, tuple[int, ...]] = {}
    for n, count in enumerate(groups):
        d = width // count
        for name in ("before_proj", "after_proj"):
            shapes |= _linear(f"{CONTROL}{n}.{name}", width, width)
        shapes[f"{CONTROL}{n}.process.scale_shift_table"] = (6, width)
        for g in range(count):
            attn = f"{CONTROL}{n}.process.experts_attn.{g}.attn"
            shapes |= _linear(f"{attn}.qkv", 3 * d, d) | _linear(f"{attn}.proj", d, d)
    return shapes


def base_shapes(width: int, depth: int) -> dict[str, Shape]:
    """Key -> shape of PixArt's own weights, as PixArt-alpha's files have them."""
    d, third = width, width // 3
    shapes: dict[str, Shape] = {
        "pos_embed": (1, None, d), "x_embedder.proj.weight": (d, None, 2, 2), "x_embedder.proj.bias": (d,),
        "y_embedder.y_embedding": (None, None), "final_layer.scale_shift_table": (2, d),
        **_sizes("t_embedder.mlp.0", d, None), **_sizes("t_embedder.mlp.2", d, d), **_sizes("t_block.1", 6 * d, d),
        **_sizes("y_embedder.y_proj.fc1", d, None), **_sizes("y_embedder.y_proj.fc2", d, d),
        **_sizes("final_layer.linear", None, d),
    }  # fmt: skip
    for name in ("csize_embedder", "ar_embedder"):
        shapes |= _sizes(f"{name}.mlp.0", third, None) | _sizes(f"{name}.mlp.2", third, third)
    linears = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "cross_attn.q_linear": (d, d),
               "cross_attn.kv_linear": (2 * d, d), "cross_attn.proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}  # fmt: skip
    for i in range(depth):
        shapes[f"blocks.{i}.scale_shift_table"] = (6, d)
        for name, (rows, columns) in linears.items():
            shapes |= _sizes(f"blocks.{i}.{name}", rows, columns)
    return shapes


def read(tensors: Mapping[str, torch.Tensor], name: str) -> RelaCtrl:
    """The content of a file of that name. ValueError, one sentence with every tensor that is at fault, where it is no
    RelaCtrl of eleven blocks."""
    width = _common([t.numel() for key, t in tensors.items() if re.fullmatch(WIDE, key)])
    if not width:
        first = min(tensors, default="nothing")
        raise ValueError(
            f"{name} holds no RelaCtrl: there is no {CONTROL}0.before_proj.bias, and it begins with {first!r}. Take a file of "
            "qihoo360/RelaCtrl."
        )
    groups = tuple(_groups(tensors, n, width, name) for n in range(len(PLACES)))
    control = {key: tensor for key, tensor in tensors.items() if not key.startswith(BASE)}
    _fits(control, expected(width, groups), name)
    base = {key.removeprefix(BASE): tensor for key, tensor in tensors.items() if key.startswith(BASE)}
    _check_base(base, width, name)
    return RelaCtrl(name, tuple(_block(control, n, count) for n, count in enumerate(groups)))


def _linear(path: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{path}.weight": (rows, columns), f"{path}.bias": (rows,)}


def _sizes(path: str, rows: int | None, columns: int | None) -> dict[str, Shape]:
    return {f"{path}.weight": (rows, columns), f"{path}.bias": (rows,)}


def _common(sizes: list[int]) -> int:
    """The size that most tensors tell, so that a wrong one is found by the others; 0 without any."""
    return Counter(sizes).most_common(1)[0][0] if sizes else 0


def _groups(tensors: Mapping[str, torch.Tensor], n: int, width: int, name: str) -> int:
    """Groups of block n, told by their sizes and not by their number: so the last ones are missed where they are missing."""
    within = f"{CONTROL}{n}.process.experts_attn."
    found = {key: t for key, t in tensors.items() if key.startswith(within) and t.ndim in (1, 2)}
    d = _common([t.shape[-1] // (3 if key.endswith("qkv.bias") else 1) for key, t in found.items()])
    if not d or width % d or d % HEADS:
        told = f"groups of {d} channels, which are no part of {width} for {HEADS} heads" if d else f"no {within}*"
        raise ValueError(f"{name} is no RelaCtrl of {len(PLACES)} blocks for PixArt: block {n} has {told}.")
    return width // d


def _fits(tensors: Mapping[str, torch.Tensor], want: Mapping[str, Shape], name: str) -> None:
    """ValueError that lists what is missing, what nobody knows and what has another shape."""
    wrong = [
        f"{key} {[*tensors[key].shape]} in place of {[*shape]}"
        for key, shape in want.items()
        if key in tensors and not _same(tensors[key], shape)
    ]
    faults = {
        "lacks": sorted(want.keys() - tensors.keys()),
        "also has": sorted(tensors.keys() - want.keys()),
        "has": wrong,
    }
    told = [f"it {words} {_listed(keys)}" for words, keys in faults.items() if keys]
    if told:
        raise ValueError(f"{name} is no RelaCtrl for PixArt: {'; '.join(told)}. Take a file of qihoo360/RelaCtrl.")


def _check_base(base: Mapping[str, torch.Tensor], width: int, name: str) -> None:
    """What is not used must still be PixArt's, or the control blocks are of another model."""
    depth = 1 + max((int(found[1]) for key in base if (found := re.match(r"blocks\.(\d{1,3})\.", key))), default=-1)
    known = base_shapes(width, depth)
    strange = [
        f"{BASE}{key} {[*tensor.shape]}"
        for key, tensor in base.items()
        if key not in known or not _same(tensor, known[key])
    ]
    if strange:
        raise ValueError(
            f"{name} holds a base model that is not PixArt of width {width}: {_listed(sorted(strange))}. Take a file of "
            "qihoo360/RelaCtrl."
        )


def _same(tensor: torch.Tensor, shape: Shape) -> bool:
    return tensor.ndim == len(shape) and all(w in (None, s) for s, w in zip(tensor.shape, shape, strict=True))


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _block(tensors: Mapping[str, torch.Tensor], n: int, groups: int) -> ControlBlock:
    def pair(path: str) -> Pair:
        return tensors[f"{CONTROL}{n}.{path}.weight"], tensors[f"{CONTROL}{n}.{path}.bias"]

    mixers = [
        (pair(f"process.experts_attn.{g}.attn.qkv"), pair(f"process.experts_attn.{g}.attn.proj")) for g in range(groups)
    ]
    table = tensors[f"{CONTROL}{n}.process.scale_shift_table"]
    return ControlBlock(pair("before_proj"), pair("after_proj"), table, tuple(mixers))
