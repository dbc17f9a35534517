"""EasyControl's two passes, both through the stock network. The condition goes through it alone, at timestep 0, with LoRA
behind the projections, and leaves its keys and values before RoPE; the picture's pass then attends to them as well. The
condition never sees the picture, so its keys and values hold for all steps, exactly (arXiv 2503.07027, sections 3.2 to 3.4)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .. import archs
from ..kernels.control.grouped_lora import grouped_lora
from ..methods.control.easycontrol import Block, EasyControlWeights, Lora
from .run import current_forward

SUBJECT_ROWS = 64  # a subject stands so many rows below the picture's first one (official code)
Pair = tuple[torch.Tensor, torch.Tensor]
Key = tuple[str, int]  # block_type and block_index of transformer_options


@dataclass(frozen=True)
class Positions:
    """Where the picture's tokens lie: ids [.., 3] of the first one, and what a row and a column add to it."""

    first: tuple[float, ...]
    row: float
    column: float
    grid: tuple[int, int]

    def ids(self, height: int, width: int, subject: bool) -> torch.Tensor:
        """Of a condition of so many tokens -> [1, height * width, A] fp32. A layout covers the whole picture; a subject
        keeps its own size, SUBJECT_ROWS below."""
        out = torch.tensor(self.first, dtype=torch.float32).repeat(height, width, 1)
        down, right = (1.0, 1.0) if subject else (self.grid[0] / height, self.grid[1] / width)
        rows = torch.arange(height, dtype=torch.float32) * down + (SUBJECT_ROWS if subject else 0)
        out[..., 1] += (rows * self.row)[:, None]
        out[..., 2] += (torch.arange(width, dtype=torch.float32) * right * self.column)[None]
        return out.flatten(0, 1)[None]


def positions_of(network: Any, x: torch.Tensor, options: dict[str, Any]) -> Positions:
    """Of the picture x [B, C, H, W], as the stock model places it, core's ScaleROPE node included."""
    ids = network.process_img(x[:1], transformer_options=options)[1][0]
    height, width = (-(-side // network.patch_size) for side in x.shape[-2:])
    row = float(ids[width, 1] - ids[0, 1]) if height > 1 else 1.0
    column = float(ids[1, 2] - ids[0, 2]) if width > 1 else 1.0
    return Positions(tuple(ids[0].tolist()), row, column, (height, width))


def added(down: torch.Tensor, up: torch.Tensor, x: torch.Tensor, base: torch.Tensor, scale: float) -> torch.Tensor:
    """base [B, N, M] + scale * up(down(x)), x [B, N, D]."""
    down, up = (weight.to(x.device, x.dtype)[None] for weight in (down, up))
    return grouped_lora(x, down, up, [x.shape[1]], [0], [scale], None, base)


def _on_qkv(block: Block, scale: float, width: int):
    """Behind a projection whose first 3 * width outputs are q, k and v."""

    def hook(module, args, out):
        loras = [block[part] for part in "qkv"]
        down, up = torch.cat([lora.down for lora in loras]), torch.block_diag(*(lora.up for lora in loras))
        out[..., : 3 * width] = added(down, up, args[0], out[..., : 3 * width], scale)
        return out

    return hook


def _on_output(lora: Lora, scale: float):
    return lambda module, args, out: added(lora.down, lora.up, out, out, scale)


@contextmanager
def lora_on(network: Any, weights: EasyControlWeights, scale: float) -> Iterator[None]:
    """The LoRA act behind the projections of the stock blocks, whatever form their weights have, until it ends."""
    handles = []
    try:
        for stock, block in zip(map(archs.original, network.double_blocks), weights.double, strict=True):
            handles.append(stock.img_attn.qkv.register_forward_hook(_on_qkv(block, scale, weights.width)))
            handles.append(stock.img_attn.proj.register_forward_hook(_on_output(block["proj"], scale)))
        for stock, block in zip(map(archs.original, network.single_blocks), weights.single, strict=True):
            handles.append(stock.linear1.register_forward_hook(_on_qkv(block, scale, weights.width)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def keys_and_values(
    network: Any,
    condition: torch.Tensor,
    inputs: dict[str, Any],
    rotations: torch.Tensor,
    weights: EasyControlWeights,
    scale: float,
) -> dict[Key, Pair]:
    """The condition's pass. condition [b, C, h, w] as the model sees latents; inputs: the picture's context, y and guidance
    for these b rows; rotations of the condition's tokens -> by block, k and v [b, H, Nc, D], k before RoPE.

    One text token goes along, because quantized projections do not take empty texts; nothing attends to it."""
    kept: dict[Key, Pair] = {}

    def keep(q, k, v, pe=None, attn_mask=None, extra_options=None):
        kept[extra_options["block_type"], extra_options["block_index"]] = (k[:, :, 1:].clone(), v[:, :, 1:].clone())
        unseen = torch.zeros(1, 1, 1, k.shape[2], dtype=q.dtype, device=q.device)
        unseen[..., 0] = float("-inf")
        return {"pe": torch.cat([torch.zeros_like(rotations[:, :, :1]), rotations], 2), "attn_mask": unseen}

    context = inputs["context"][:, :1]
    given = {name: inputs[name] for name in ("y", "guidance") if inputs.get(name) is not None}
    timestep = torch.zeros(condition.shape[0], device=condition.device, dtype=inputs["timestep"].dtype)
    token = current_forward.set(None)  # what acts on the picture's blocks must not act here
    try:
        with lora_on(network, weights, scale):
            network(condition, timestep, context, **given, transformer_options={"patches": {"attn1_patch": [keep]}})
    finally:
        current_forward.reset(token)
    return kept


def appending(forward, held: Callable[[Key], Pair], rotations: torch.Tensor):
    """The attn1_patch of the picture's pass: keys, values and rotations of the condition stand behind the picture's."""

    def append(q, k, v, pe=None, attn_mask=None, extra_options=None, **unknown):
        more_k, more_v = held((extra_options["block_type"], extra_options["block_index"]))
        out = {
            "k": torch.cat([k, more_k.to(k.dtype)], 2),
            "v": torch.cat([v, more_v.to(v.dtype)], 2),
            "pe": torch.cat([pe, rotations.to(pe).expand(pe.shape[0], *rotations.shape[1:])], 2),
        }
        if forward.rotation is not None:  # told before, of the picture's own tokens
            forward.rotation = out["pe"]
        if attn_mask is not None:
            out["attn_mask"] = F.pad(attn_mask, (0, more_k.shape[2]), value=attn_mask.dtype == torch.bool)
        return out

    return append
