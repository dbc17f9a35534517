"""Where image tokens lie in a block, and a block's arguments and masks for some of them."""

from dataclasses import dataclass

import torch

from .. import archs
from ..methods.cache.region import Grid
from .blocks import BlockPosition, Streams
from .forward import Forward


@dataclass(frozen=True)
class Place:
    """Where the image tokens lie in one block."""

    tokens: int
    offset: int  # in its first stream
    stream: int  # tokens of that
    start: int  # in its joint attention calls
    total: int  # tokens of those

    def of(self, kind: str, joined: bool) -> tuple[int, int]:
        """(start, total) in an attention call of that kind."""
        return (self.start, self.total) if kind == "joint" or joined else (self.offset, self.stream)


def place_of(forward: Forward, block, streams) -> tuple[Place | None, str | None]:
    """Where the image tokens lie in this block, or why that is not known."""
    arch, grid = forward.run.arch, forward.grid
    if grid is None or forward.obscured:
        return None, "token layout unknown"
    image = streams[0].shape[1]
    text = streams[1].shape[1] if len(streams) > 1 and streams[1] is not None else 0
    kind, pad = block.spec.calls[0], arch.pad(forward.diffusion_model)
    references = sum((forward.arguments.get("transformer_options") or {}).get("reference_image_num_tokens") or ())
    total = image + text if kind == "joint" else image
    layout = archs.layout_of(arch, grid, kind, total, total, references, pad)
    if layout is None:
        return None, "tokens beside the picture's own"
    start = layout.image.start
    offset = start - text if arch.place == "prefix" else start
    tokens = layout.image.stop - start
    if offset < 0 or offset + tokens > image:
        return None, "token layout unknown"
    return Place(tokens, offset, image, start, total), None


def patch_of(arch, diffusion_model, shape: tuple[int, ...]) -> Grid:
    """Size (t, h, w) in cells of the patch of one token, from how the grid of a latent [b, C, (T,) H, W] grows."""
    sizes = []
    for axis in (-3, -2, -1):
        n, asked = 1, list(shape)
        while (len(shape) == 5 or axis != -3) and n < shape[axis]:
            asked[axis] = n + 1
            if arch.grid(diffusion_model, torch.empty(asked, device="meta"))[axis] > 1:
                break
            n += 1
        sizes.append(n)
    return sizes[0], sizes[1], sizes[2]


def unfit(forward: Forward, block: BlockPosition, place, streams: Streams) -> str | None:
    """Why the arguments of this block cannot be cut to some of its tokens."""
    if place is None:
        return None
    rows = streams[0].shape[0]
    if rows % len(forward.keys):
        return "rows cannot be told apart by prompt"
    for name, value in forward.arguments.items():
        if name.startswith(("modulation_dims", "timestep_zero")) and value is not None:
            return "some tokens have a time step of their own"
        if name == "vec" and name not in block.spec.per_token:
            for leaf in leaves(value):
                if leaf.shape[0] not in (1, rows) or (leaf.ndim > 2 and leaf.shape[1] > 1):
                    return "some tokens have a time step of their own"
    for name, (axis, ndim) in block.spec.per_token.items():
        value = forward.arguments.get(name)
        if name not in forward.arguments or (value is not None and not torch.is_tensor(value)):
            return f"the block hides its {name}"
        shape = () if value is None else value.shape
        if len(shape) != ndim and {place.total, place.stream} & {*shape}:
            return f"{name} has {len(shape)} dimensions, not {ndim}"
        length = shape[axis] if len(shape) == ndim else 1
        framed = place.stream == place.tokens and place.tokens % length == 0
        if length not in (1, place.total, place.stream) and not framed:
            return f"{name} of {length} entries fits neither {place.total} nor {place.stream} tokens"
    return None


def leaves(value) -> list[torch.Tensor]:
    """Every tensor in nested tuples, lists and dataclasses."""
    if torch.is_tensor(value):
        return [value]
    parts = value if isinstance(value, list | tuple) else vars(value).values() if hasattr(value, "__dict__") else ()
    return [leaf for part in parts for leaf in leaves(part)]


def gathered(arguments, per_token, place, rows, sequence, stream) -> dict[str, torch.Tensor]:
    """The per-token arguments of a block, of some of its tokens."""
    found = {}
    for name, (axis, ndim) in per_token.items():
        value = arguments[name]
        if value is None or value.ndim != ndim or value.shape[axis] == 1:
            continue
        length = value.shape[axis]
        at = sequence if length == place.total else rows
        at = at if length in (place.total, place.stream) else at // (place.stream // length)
        found[name] = taken(value, at, axis, stream.shape[0])
    return found


def taken(value: torch.Tensor, at: torch.Tensor, axis: int, batch: int) -> torch.Tensor:
    """Entries `at`, [M] or [B, M], of an axis behind the batch axis of a tensor whose batch is B or 1."""
    if at.ndim == 1:
        return value.index_select(axis, at)
    moved = value.expand(batch, *value.shape[1:]).movedim(axis, 1)
    return moved[torch.arange(batch, device=at.device)[:, None], at].movedim(1, axis)


def widened(mask, image: slice, short: int, total: int, rows: torch.Tensor):
    """A mask over computed tokens -> over all keys. Made from the computed ones alone, it tells the same of every image
    token; with a row for each query, it keeps those of `rows`."""
    if mask is None:
        return None
    if mask.shape[-2] == total != 1:
        mask = taken(mask, rows, mask.ndim - 2, max(mask.shape[0], rows.shape[0] if rows.ndim == 2 else 1))
    if mask.shape[-1] == short != total:
        computed = short - total + image.stop
        of_image = mask[..., image.start : image.start + 1].expand(*mask.shape[:-1], image.stop - image.start)
        mask = torch.cat((mask[..., : image.start], of_image, mask[..., computed:]), -1)
    return mask
