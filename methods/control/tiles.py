"""Overlapping tiles of a picture and how they are blended, as StableSR (arXiv 2305.07015) and DiT4SR's authors do it: every
tile under a Gaussian of variance 0.01 of its side, then the sum over the sum of weights."""

import torch

VARIANCE = 0.01  # of a side of 1


def spans(size: int, tile: int, overlap: int) -> list[slice]:
    """Tiles along a side; the last one ends with it and may overlap more."""
    if size <= tile:
        return [slice(0, size)]
    starts = [*range(0, size - tile, tile - overlap), size - tile]
    return [slice(start, start + tile) for start in starts]


def bell(size: int) -> torch.Tensor:
    """Weights [size], fp32, symmetric about the middle."""
    x = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    return (-0.5 * (x / size) ** 2 / VARIANCE).exp().float()


class Blend:
    """Sums tiles of one picture [..., H, W] in fp32."""

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None
        self.weight: torch.Tensor | None = None

    def add(self, tile: torch.Tensor, part: tuple[slice, slice], sides: tuple[int, int]) -> None:
        """tile [..., h, w] belongs at `part` of a picture with these sides."""
        if self.total is None or self.weight is None:
            self.total = torch.zeros(*tile.shape[:-2], *sides, device=tile.device)
            self.weight = torch.zeros(sides, device=tile.device)
        weight = (bell(tile.shape[-2])[:, None] * bell(tile.shape[-1])).to(tile.device)
        self.total[(..., *part)] += tile.float() * weight
        self.weight[part] += weight

    def made(self, dtype: torch.dtype) -> torch.Tensor:
        assert self.total is not None and self.weight is not None
        return (self.total / self.weight).to(dtype)
