"""DynamiCtrl (arXiv 2503.21246; gulucaptain/DynamiCtrl): a CogVideoX image-to-video transformer, all of it fine-tuned,
with one more norm in each block that puts a pose video into attention.

The tokens of the pose, c_0 = patch_embed([z; z]) with the latent z of the pose video on all channels, go through a
chain of their own that never sees the noise or the text:

    (shift, scale, gate) = W_l SiLU(temb) + b_l      y_l = LN_l(c_l) (1 + scale) + shift      c_{l+1} = (1 + gate) y_l

and y_l is added to the picture's rows of block l's attention input. Files have diffusers' CogVideoX names, and beside
them

    transformer_blocks.I.control_norm1.{linear.weight [3 D, T], linear.bias, norm.weight [D], norm.bias}
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...kernels.norm.pose_modulate import pose_modulate

HEAD, LATENT, EPS = 64, 16, 1e-5  # channels of a head, of a latent; the norms' epsilon
PATCH, JOINED = 2, 2  # latent cells a token is wide, and frames it is long in version 1.5
MARK = "control_norm1"
Shape = tuple[int, ...]
PLACES = (  # below a block: diffusers' name, core's name; weight and bias of each
    ("attn1.to_q", "q"), ("attn1.to_k", "k"), ("attn1.to_v", "v"), ("attn1.to_out.0", "attn_out"), ("attn1.norm_q", "norm_q"),
    ("attn1.norm_k", "norm_k"), ("ff.net.0.proj", "ff_proj"), ("ff.net.2", "ff_out"), ("norm1.linear", "norm1.linear"),
    ("norm1.norm", "norm1.norm"), ("norm2.linear", "norm2.linear"), ("norm2.norm", "norm2.norm"),
)  # fmt: skip
SIDE = ("linear.weight", "linear.bias", "norm.weight", "norm.bias")
OUTSIDE = {"time_embedding.linear_": "time_embedding_linear_", "ofs_embedding.linear_": "ofs_embedding_linear_"}
POSITIONS = "patch_embed.pos_embedding"


@dataclass(frozen=True)
class Sizes:
    """What a file's shapes tell. positions: tokens of its learned table, text included; 0 where it has none."""

    dim: int
    time: int
    layers: int
    text: int
    joined: bool  # version 1.5: two frames a token
    ofs: int = 0
    positions: int = 0


def read_sizes(shapes: Mapping[str, Shape], name: str) -> Sizes:
    """ValueError, one sentence, for a file that is no DynamiCtrl transformer."""
    found = [re.match(r"transformer_blocks\.(\d+)\.", key) for key in shapes]
    layers = 1 + max((int(m[1]) for m in found if m), default=-1)
    if not any(MARK in key for key in shapes):
        other = "a plain CogVideoX: load it with Load Diffusers Model" if layers else "something else"
        raise ValueError(f"{name} has no {MARK} tensors, so it is not DynamiCtrl's transformer but {other}.")

    def size(key: str, axis: int) -> int:
        if key not in shapes or len(shapes[key]) <= axis:
            raise ValueError(f"{name} lacks {key}, which tells its size. {REMEDY}")
        return shapes[key][axis]

    if layers > len(shapes):
        raise ValueError(f"{name} names block {layers - 1} but has {len(shapes)} tensors in all. {REMEDY}")
    dim, joined = size("proj_out.weight", 1), len(shapes.get("patch_embed.proj.weight", ())) == 2
    if dim < HEAD or dim % HEAD:
        raise ValueError(f"{name} is {dim} channels wide, and CogVideoX has heads of {HEAD}. {REMEDY}")
    ofs = size("ofs_embedding.linear_1.weight", 0) if "ofs_embedding.linear_1.weight" in shapes else 0
    positions = size(POSITIONS, 1) if POSITIONS in shapes else 0
    return Sizes(
        dim,
        size("time_embedding.linear_1.weight", 0),
        layers,
        size("patch_embed.text_proj.weight", 1),
        joined,
        ofs,
        positions,
    )


REMEDY = "Download it again from gulucaptain."


def expected(sizes: Sizes) -> dict[str, Shape]:
    """Key -> shape of every tensor of a file of these sizes."""
    d, t = sizes.dim, sizes.time
    cells = PATCH * PATCH * (JOINED if sizes.joined else 1)
    linears: dict[str, Shape] = {
        "patch_embed.text_proj": (d, sizes.text), "time_embedding.linear_1": (t, d), "time_embedding.linear_2": (t, t),
        "patch_embed.proj": (d, 2 * LATENT * cells) if sizes.joined else (d, 2 * LATENT, PATCH, PATCH),
        "norm_final": (d,), "norm_out.linear": (2 * d, t), "norm_out.norm": (d,), "proj_out": (LATENT * cells, d),
    }  # fmt: skip
    if sizes.ofs:
        linears |= {f"ofs_embedding.linear_{n}": (sizes.ofs, sizes.ofs) for n in (1, 2)}
    within: dict[str, Shape] = {
        "attn1.to_q": (d, d), "attn1.to_k": (d, d), "attn1.to_v": (d, d), "attn1.to_out.0": (d, d), "attn1.norm_q": (HEAD,),
        "attn1.norm_k": (HEAD,), "ff.net.0.proj": (4 * d, d), "ff.net.2": (d, 4 * d), "norm1.linear": (6 * d, t),
        "norm1.norm": (d,), "norm2.linear": (6 * d, t), "norm2.norm": (d,), f"{MARK}.linear": (3 * d, t), f"{MARK}.norm": (d,),
    }  # fmt: skip
    linears |= {f"transformer_blocks.{i}.{key}": shape for i in range(sizes.layers) for key, shape in within.items()}
    made = {
        f"{key}.{end}": shape if end == "weight" else shape[:1]
        for key, shape in linears.items()
        for end in ("weight", "bias")
    }
    return made | ({POSITIONS: (1, sizes.positions, d)} if sizes.positions else {})


def check(shapes: Mapping[str, Shape], want: Mapping[str, Shape], name: str) -> None:
    """ValueError, one sentence, where a key is missing, unknown, or of another shape."""
    for keys, words in ((want.keys() - shapes.keys(), "lacks"), (shapes.keys() - want.keys(), "also has")):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{name} is not a whole DynamiCtrl transformer: it {words} {min(keys)!r}{more}. {REMEDY}")
    for key, shape in want.items():
        if shapes[key] != shape:
            raise ValueError(f"{name}: {key} is {[*shapes[key]]}, needed is {[*shape]}. {REMEDY}")


def core_key(key: str) -> str:
    """diffusers' name of a tensor -> ComfyUI's."""
    found = re.match(r"transformer_blocks\.(\d+)\.(.+)\.(weight|bias)$", key)
    if found:
        return f"blocks.{found[1]}.{dict(PLACES)[found[2]]}.{found[3]}"
    return next((new + key[len(old) :] for old, new in OUTSIDE.items() if key.startswith(old)), key)


class PoseNorm(torch.nn.Module):
    """The added norm of one block."""

    def __init__(self, dim: int, time: int, operations: Any = torch.nn, dtype: torch.dtype | None = None):
        super().__init__()
        self.linear = operations.Linear(time, 3 * dim, dtype=dtype)
        self.norm = operations.LayerNorm(dim, eps=EPS, dtype=dtype)

    def forward(
        self, c: torch.Tensor, temb: torch.Tensor, base: torch.Tensor | None = None, strength: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """c [b, N, D], temb [1 or b, T] -> y [b, N, D], or base + strength y for a base [B, N, D]; and the next c."""
        shift, scale, gate = self.linear(torch.nn.functional.silu(temb)).to(c.dtype).chunk(3, 1)
        return pose_modulate(c, self.norm.weight.to(c), self.norm.bias.to(c), shift, scale, gate, EPS, base, strength)


def build(sizes: Sizes, tensors: Mapping[str, torch.Tensor], operations: Any = torch.nn) -> torch.nn.ModuleList:
    """The added norms of a file, in its own precision. tensors: all of it."""
    dtype = tensors[f"transformer_blocks.0.{MARK}.linear.weight"].dtype
    norms = torch.nn.ModuleList(PoseNorm(sizes.dim, sizes.time, operations, dtype) for _ in range(sizes.layers))
    norms.load_state_dict(
        {f"{i}.{end}": tensors[f"transformer_blocks.{i}.{MARK}.{end}"] for i in range(sizes.layers) for end in SIDE}
    )
    return norms.eval().requires_grad_(False)


def crop(height: int, width: int, base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where a picture of height x width tokens lies, scaled to fit, in the trained one: ((top, left), (bottom, right))."""
    high, wide = base
    if height / width > high / wide:
        inner = high, round(high / height * width)
    else:
        inner = round(wide / width * height), wide
    top, left = round((high - inner[0]) / 2), round((wide - inner[1]) / 2)
    return (top, left), (top + inner[0], left + inner[1])


def _turns(positions: torch.Tensor, dim: int) -> torch.Tensor:
    """[n] -> angles [n, dim], each for a pair of neighbouring channels."""
    speeds = 1.0 / (10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim))
    return torch.outer(positions, speeds).repeat_interleave(2, dim=1)


def rotation(
    grid: tuple[int, int, int], base: tuple[int, int], joined: bool, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) [T H W, 64] as diffusers makes them: version 1.0 stretches the picture over the trained `base` (h, w), as
    far as its proportions allow; 1.5 counts tokens."""
    t, h, w = grid

    def line(start: float, stop: float, n: int) -> torch.Tensor:
        return torch.linspace(start, stop * (n - 1) / n, n, device=device, dtype=torch.float32)

    if joined:
        times, rows, columns = (torch.arange(n, device=device, dtype=torch.float32) for n in grid)
    else:
        (top, left), (bottom, right) = crop(h, w, base)
        times, rows, columns = line(0, t, t), line(top, bottom, h), line(left, right, w)
    dims = HEAD // 4, HEAD // 8 * 3, HEAD // 8 * 3
    parts = [_turns(at, dim) for at, dim in zip((times, rows, columns), dims, strict=True)]
    views = [(t, 1, 1), (1, h, 1), (1, 1, w)]
    made = []
    for wave in (torch.cos, torch.sin):
        each = [wave(part).view(*v, -1).expand(t, h, w, -1) for part, v in zip(parts, views, strict=True)]
        made.append(torch.cat(each, -1).reshape(math.prod(grid), HEAD))
    return made[0], made[1]
