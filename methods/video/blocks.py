"""A video made block by block: where blocks begin, which finished frames a block may look back on, and the noise that
takes a prediction back to an earlier noise level."""

from itertools import pairwise

import torch

from ...kernels.sampling import renoise as kernel

STRIDE = 1000  # from a block's seed to the next one's: each block has so many steps of its own


def split(frames: int, per_block: int, lead: int = 0) -> list[int]:
    """Boundaries 0 .. frames of blocks; the first one takes what is left over: 43 by 10 is [0, 13, 23, 33, 43]. lead: frames
    that it has more, where later blocks have so many finished ones beside them."""
    if frames < 1 or per_block < 1:
        raise ValueError(f"Blocks of {per_block} frames cannot be cut from {frames}; both must be at least 1.")
    first = min(frames, per_block + lead + max(frames - lead, 0) % per_block)
    return [0, *range(first, frames + 1, per_block)]


def continued(frames: int, per_block: int, done: list[int], lead: int = 0) -> list[int]:
    """Boundaries of a clip of which blocks with the boundaries `done` (0 .. n) are finished. Where the clip's own split has
    them, it is that split; else the rest is split anew behind them."""
    whole = split(frames, per_block, lead)
    if whole[: len(done)] == done:
        return whole
    return [*done, *(done[-1] + at for at in split(frames - done[-1], per_block)[1:])]


def kept(boundaries: list[int], first: int, window: int, sink: int) -> list[int]:
    """Finished frames that a block which starts at frame `first` looks back on: the first `sink` ones and those of the last
    `window` blocks, all of them where window is 0."""
    before = [at for at in boundaries if at < first]
    start = 0 if window == 0 else before[-window] if len(before) >= window else 0
    return [frame for frame in range(first) if frame >= start or frame < sink]


def pairs(boundaries: list[int]) -> list[tuple[int, int]]:
    """(first, last) frame of each block, last not included."""
    return list(pairwise(boundaries))


def seed_of(seed: int, block: int) -> int:
    """What noise is drawn from in a block; step i of it adds i."""
    return seed + STRIDE * block


def noise_like(x: torch.Tensor, seed: int, block: int, step: int) -> torch.Tensor:
    """The fresh noise of a step, drawn where x lies, as ComfyUI's ar_video sampler draws it."""
    generator = torch.Generator(x.device).manual_seed((seed_of(seed, block) + step) % (1 << 64))
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def renoise(x0: torch.Tensor, sigma: float | torch.Tensor, seed: int, block: int, step: int) -> torch.Tensor:
    """The clean x0 of a flow back at noise level sigma: (1 - sigma) x0 + sigma noise."""
    return kernel.renoise(x0, None, noise_like(x0, seed, block, step), 0.0, float(sigma))
