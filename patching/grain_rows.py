"""Where image tokens lie in a block whose cells are merged, and the block's per-token arguments for the merged ones."""

from typing import Any

import torch

from .. import archs
from ..kernels.tokens.merge_cells import merge_cells
from ..methods.cache.grain import Grain, merge_rotations
from .blocks import BlockPosition, Streams
from .forward import Forward
from .region_rows import Place

MASKS = ("attn_mask", "attention_mask", "x_mask")
OWN_TIME = ("modulation_dims", "timestep_zero")  # beginnings of arguments that give some tokens another time step


def image_of(forward: Forward, block: BlockPosition, streams: Streams) -> tuple[Place | None, str | None]:
    """The image tokens of this block, or why they are not known."""
    arch, grid = forward.run.arch, forward.grid
    if grid is None or forward.obscured or not torch.is_tensor(streams[0]):
        return None, "token layout unknown"
    told = forward.arguments.get("transformer_options") or {}
    if sum(told.get("reference_image_num_tokens") or ()) or streams[0].shape[0] % len(forward.keys):
        return None, "tokens beside the picture's own"
    stream = streams[0].shape[1]
    text = streams[1].shape[1] if len(streams) > 1 and streams[1] is not None else 0
    kind = block.spec.calls[0]
    total = stream + text if kind == "joint" else stream
    layout = archs.layout_of(arch, grid, kind, total, total, 0, arch.pad(forward.diffusion_model))
    if layout is None:
        return None, "tokens beside the picture's own"
    start, tokens = layout.image.start, layout.image.stop - layout.image.start
    offset = start - text if arch.place == "prefix" else start
    if not 0 <= offset <= stream - tokens:
        return None, "token layout unknown"
    return Place(tokens, offset, stream, start, total), None


def unfit(forward: Forward, block: BlockPosition, image: Place | None) -> str | None:
    """Why the arguments of this block cannot be merged."""
    arguments = forward.arguments
    if image is None:
        return None
    if not isinstance(arguments.get("transformer_options"), dict):
        return "the block hides its options"
    if any(name.startswith(OWN_TIME) and value is not None for name, value in arguments.items()):
        return "some tokens have a time step of their own"
    if any(arguments.get(name) is not None for name in MASKS):
        return "an attention mask over all tokens"
    for name, (axis, ndim) in block.spec.per_token.items():
        value = arguments.get(name)
        if name not in arguments or (value is not None and not torch.is_tensor(value)):
            return f"the block hides its {name}"
        if value is not None and value.ndim == ndim:
            length = value.shape[axis]
            framed = image.tokens == image.stream and image.tokens % length == 0
            if length not in (1, image.total, image.stream) and not framed:
                return f"{name} of {length} entries fits neither {image.total} nor {image.stream} tokens"
    return None


def merged_arguments(forward: Forward, block: BlockPosition, image: Place, grain: Grain, held: dict[Any, Any]):
    """{name: the argument for merged tokens}. held: what earlier blocks of this call made of the same tensors."""
    found = {}
    for name, (axis, ndim) in block.spec.per_token.items():
        value = forward.arguments[name]
        if value is None or value.ndim != ndim or value.shape[axis] == 1:
            continue
        key = name, id(value), image.total
        if key not in held:
            held[key] = value, _merged(value, axis, image, grain)  # the tensor too: ids of freed ones come again
        found[name] = held[key][1]
    return found


def _merged(value: torch.Tensor, axis: int, image: Place, grain: Grain) -> torch.Tensor:
    """A tensor with an entry for each token, or for as many in a row, along its axis -> for the merged ones."""
    batch, length = grain.order.shape[0], value.shape[axis]
    rows = value.expand(batch, *value.shape[1:]).movedim(axis, 1)
    start = image.start if length == image.total else image.offset
    if length not in (image.total, image.stream):
        rows, start = rows.repeat_interleave(image.stream // length, 1), 0
    own = rows[:, start : start + image.tokens]
    if rows.shape[-2:] == (2, 2) and rows.ndim > 4:
        merged = merge_rotations(own, grain.order, grain.fine, grain.size)
    else:
        flat = merge_cells(own.flatten(2), grain.order, grain.fine, grain.size)
        merged = flat.view(batch, -1, *own.shape[2:])
    return torch.cat((rows[:, :start], merged, rows[:, start + image.tokens :]), 1).movedim(1, axis)
