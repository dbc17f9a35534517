"""DiT4SR (arXiv 2503.23580; acceptee/DiT4SR on Hugging Face): tokens r of a low-resolution picture run beside the picture's
own tokens x through the blocks of Stable Diffusion 3.5 medium, under the same modulation and with the same weights, but for

    q, k, v of r     to_q_control(to_q(r')), and so on, r' = r normed and modulated; before the shared norms of q and k
    attention's end  to_out_control(a_r + r')                a_r what r attended to, over x, r and the text
    feed-forward     x_mid + 1.2 DWConv3x3(r_mid)            behind the GELU; r_mid goes on as it is

Its files hold these layers under diffusers' names, beside those of the base model or alone:

    transformer_blocks.I.attn.to_{q,k,v,out}_control.{weight [D, D], bias [D]}
    transformer_blocks.I.attn2.to_{q,k,v,out}_control.{weight, bias}          in blocks that attend a second time
    transformer_blocks.I.ff.control_conv.{weight [4 D, 1, 3, 3], bias [4 D]}

Files named dit4sr_f and dit4sr_q were trained by code that took for the keys of r the normed image keys, normed once more;
dit4sr_r1 by code without this mistake.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..weight_files import read_weights

VARIANTS = ("r1", "v1")
LAYERS = ("to_q_control", "to_k_control", "to_v_control", "to_out_control")
CONTROL = re.compile(r"transformer_blocks\.(\d+)\.(?:(attn2?)\.to_[a-z]+_control|ff\.control_conv)\.(?:weight|bias)")
REMEDY = "download it again from acceptee/DiT4SR"
Shape = tuple[int | None, ...]  # None: any size


@dataclass(frozen=True)
class Sizes:
    """Of the model that a file is for."""

    blocks: int
    dual: frozenset[int]  # blocks that attend a second time, to the image alone
    width: int

    def __str__(self) -> str:
        return f"{self.blocks} blocks of width {self.width}, {len(self.dual)} of them with a second attention"


@dataclass(frozen=True, eq=False)
class Dit4sr:
    """The content of a file: its control tensors by key."""

    name: str
    sizes: Sizes
    variant: str
    tensors: Mapping[str, torch.Tensor]


def control_keys(sizes: Sizes) -> dict[str, Shape]:
    d = sizes.width
    found: dict[str, Shape] = {}
    for i in range(sizes.blocks):
        block = f"transformer_blocks.{i}."
        for attention in ("attn", "attn2") if i in sizes.dual else ("attn",):
            for layer in LAYERS:
                found |= _linear(f"{block}{attention}.{layer}", d, d)
        found |= {f"{block}ff.control_conv.weight": (4 * d, 1, 3, 3), f"{block}ff.control_conv.bias": (4 * d,)}
    return found


def base_keys(sizes: Sizes) -> dict[str, Shape]:
    """Of the Stable Diffusion 3.5 that the released files also hold."""
    d = sizes.width
    found: dict[str, Shape] = {"pos_embed.pos_embed": (1, None, d), **_linear("context_embedder", d, None)}
    found |= {"pos_embed.proj.weight": (d, None, None, None), "pos_embed.proj.bias": (d,)}
    found |= _linear("norm_out.linear", 2 * d, d) | _linear("proj_out", None, d)
    for name in ("timestep_embedder", "text_embedder"):
        found |= _linear(f"time_text_embed.{name}.linear_1", d, None)
        found |= _linear(f"time_text_embed.{name}.linear_2", d, d)
    for i in range(sizes.blocks):
        last = i == sizes.blocks - 1  # it makes nothing of its text any more
        block = f"transformer_blocks.{i}."
        found |= _linear(f"{block}norm1.linear", (9 if i in sizes.dual else 6) * d, d)
        found |= _linear(f"{block}norm1_context.linear", (2 if last else 6) * d, d)
        found |= _attention(f"{block}attn.", d) | _added(f"{block}attn.", d, last)
        if i in sizes.dual:
            found |= _attention(f"{block}attn2.", d)
        for part in ("ff",) if last else ("ff", "ff_context"):
            found |= _linear(f"{block}{part}.net.0.proj", 4 * d, d) | _linear(f"{block}{part}.net.2", d, 4 * d)
    return found


def idle_keys(sizes: Sizes) -> dict[str, Shape]:
    """What the authors' class also makes of a second attention, which has no text, and never runs."""
    return {
        key: shape
        for i in sizes.dual
        for key, shape in _added(f"transformer_blocks.{i}.attn2.", sizes.width, i == sizes.blocks - 1).items()
    }


def _linear(name: str, rows: int | None, columns: int | None) -> dict[str, Shape]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _attention(path: str, d: int) -> dict[str, Shape]:
    found: dict[str, Shape] = {f"{path}norm_{name}.weight": (None,) for name in "qk"}
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        found |= _linear(path + name, d, d)
    return found


def _added(path: str, d: int, last: bool) -> dict[str, Shape]:
    found: dict[str, Shape] = {f"{path}norm_added_{name}.weight": (None,) for name in "qk"}
    for name in ("add_q_proj", "add_k_proj", "add_v_proj") + (() if last else ("to_add_out",)):
        found |= _linear(path + name, d, d)
    return found


def sizes_of(shapes: Mapping[str, tuple[int, ...]], name: str) -> Sizes:
    """What the keys of a file tell. ValueError where it holds none of DiT4SR's."""
    met = [(key, match) for key in shapes if (match := CONTROL.fullmatch(key))]
    widths = Counter(shapes[key][0] for key, match in met if match[2] and len(shapes[key]) == 1)
    if not widths or not any("control_conv" in key for key, _ in met):
        raise ValueError(
            f"{name} holds no DiT4SR adapter: of its {len(shapes)} tensors none is named ff.control_conv beside "
            "attn.to_q_control. Take diffusion_pytorch_model.safetensors of acceptee/DiT4SR."
        )
    parts = Counter((int(match[1]), match[2] == "attn2") for _, match in met)
    whole = [part for part, count in parts.items() if count > len(LAYERS)]  # a stray tensor makes no block
    dual = frozenset(i for i, second in whole if second)
    return Sizes(1 + max((i for i, second in whole if not second), default=0), dual, widths.most_common(1)[0][0])


def check(shapes: Mapping[str, tuple[int, ...]], name: str) -> Sizes:
    """The sizes that a file of these tensors is for. ValueError, one sentence with the tensor's name, where one is
    missing, unknown or of another shape; the base model's are all there or none of them."""
    sizes = sizes_of(shapes, name)
    control, base, idle = control_keys(sizes), base_keys(sizes), idle_keys(sizes)
    known = control | base | idle
    want = known if not shapes.keys().isdisjoint(base) else control
    unknown, missing = shapes.keys() - known.keys(), want.keys() - idle.keys() - shapes.keys()
    for keys, words in ((missing, "lacks"), (unknown, "also has")):
        if keys:
            some = f"{min(keys)!r}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
            raise ValueError(f"{name} is not a whole DiT4SR of {sizes}: it {words} {some}; {REMEDY}.")
    for key, shape in shapes.items():
        if len(shape) != len(known[key]) or any(b not in (None, a) for a, b in zip(shape, known[key], strict=True)):
            wanted = [("any" if n is None else n) for n in known[key]]
            raise ValueError(
                f"{name}: {key} is {[*shape]}, a DiT4SR of {sizes} has {wanted}; {REMEDY}.".replace("'", "")
            )
    return sizes


def variant_of(path: str | Path, metadata: Mapping[str, str], asked: str = "auto") -> str:
    """r1 or v1, told by the user, the file's metadata ("variant"), or the names of the file and its folders; the last
    that says something counts. ValueError where none does."""
    told = metadata.get("variant") if asked == "auto" else asked
    if told is None:
        for part in reversed(Path(path).parts):
            if match := re.search(r"dit4sr[-_ ]?(r1|f|q|v1)(?![a-z0-9])", part.lower()):
                told = "r1" if match[1] == "r1" else "v1"
                break
    if told not in VARIANTS:
        says = f"its metadata name the variant {told!r}" if told else "neither its name nor its metadata tell"
        raise ValueError(
            f"{Path(path).name}: {says}, but r1 and v1 treat keys differently. Set variant: v1 for dit4sr_f and dit4sr_q, r1 "
            "for dit4sr_r1; or keep the file in the folder of that name."
        )
    return told


def read(path: str | Path, variant: str = "auto") -> Dit4sr:
    """The control tensors of a file; those of the base model are named and not read. ValueError, one sentence."""
    name, found = Path(path).name, []

    def chosen(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
        found.append(check(shapes, name))
        return filter(CONTROL.fullmatch, shapes)

    tensors, metadata = read_weights(path, REMEDY, chosen)
    return Dit4sr(name, found[0], variant_of(path, metadata, variant), tensors)


class ControlAttention(torch.nn.Module):
    """The layers of one attention."""

    def __init__(self, width: int, operations: Any):
        super().__init__()
        for layer in LAYERS:
            setattr(self, layer, operations.Linear(width, width, device="meta"))

    def projected(self, qkv: torch.Tensor) -> torch.Tensor:
        """The base model's projections of r [B, N, 3 D] -> those of the adapter, the same shape."""
        parts = zip(LAYERS, qkv.chunk(3, -1), strict=False)
        return torch.cat([self.get_submodule(layer)(part) for layer, part in parts], -1)


class ControlBlock(torch.nn.Module):
    """The layers of one block."""

    def __init__(self, width: int, dual: bool, operations: Any):
        super().__init__()
        self.attn = ControlAttention(width, operations)
        self.attn2 = ControlAttention(width, operations) if dual else None
        self.control_conv = operations.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width, device="meta")


def build(adapter: Dit4sr, operations: Any = torch.nn, dtype: torch.dtype | None = None) -> torch.nn.ModuleList:
    """A ControlBlock for each block on the CPU, in the file's precision where no dtype is given."""
    sizes = adapter.sizes
    built = torch.nn.ModuleList(ControlBlock(sizes.width, i in sizes.dual, operations) for i in range(sizes.blocks))
    names = {key: key.removeprefix("transformer_blocks.").replace(".ff.", ".") for key in adapter.tensors}
    built.load_state_dict({names[key]: tensor.to(dtype) for key, tensor in adapter.tensors.items()}, assign=True)
    return built.eval().requires_grad_(False)
