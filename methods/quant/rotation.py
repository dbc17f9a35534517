"""Orthogonal rotations of a layer's input channels that leave its product as it is: (x R)(W R)' = x W'.

R is a permutation, signs and a Hadamard matrix in each block of channels, in this order. An outlier channel is spread over
its block, so that the scale of a token or a group no longer follows it.
    hadamard_regular    Kronecker powers of a 4 x 4 with equal row sums (ConvRot's): a constant row keeps its amplitude
    hadamard_sylvester  powers of [[1, 1], [1, -1]]: a constant row of n ends in one channel, sqrt(n) times as large
    hadamard_random     random signs, then Sylvester's (QuaRot)
    zigzag_hadamard     channels sorted by their largest magnitude are dealt over the blocks there and back, so that each
                        block gets its share of the outliers; then the regular one
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from ...kernels.quant.rotate import rotate

KINDS = ("none", "hadamard_regular", "hadamard_sylvester", "hadamard_random", "zigzag_hadamard")
BLOCKS = {"regular": (256, 64, 16), "sylvester": (256, 128, 64, 32, 16)}


@lru_cache(maxsize=32)
def _dense(family: str, size: int) -> torch.Tensor:
    seed = {
        "regular": [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]],
        "sylvester": [[1, 1], [1, -1]],
    }[family]
    matrix, step = torch.ones(1, 1), torch.tensor(seed, dtype=torch.float32)
    while len(matrix) < size:
        matrix = torch.kron(matrix, step)
    if len(matrix) != size:
        raise ValueError(f"A {family} Hadamard matrix has {len(step)}^n rows, not {size}.")
    return matrix / size**0.5


def hadamard(family: str, size: int) -> torch.Tensor:
    """[size, size] fp32 on the CPU, "regular" or "sylvester": symmetric, and its own inverse."""
    return _dense(family, size).clone()


def family_of(kind: str) -> str:
    """Which Hadamard matrices a kind of rotation is made of."""
    return "sylvester" if kind in ("hadamard_sylvester", "hadamard_random") else "regular"


def block_of(kind: str, columns: int) -> int | None:
    """The largest block that divides the columns, or None where no block does."""
    return next((size for size in BLOCKS[family_of(kind)] if columns % size == 0), None)


@dataclass(frozen=True, eq=False)
class Rotation:
    """R of K channels. signs [K] of +-1 and permutation [K] (int64; rotated channel i begins as channel permutation[i]) or
    None. "none" leaves everything as it is."""

    kind: str
    block: int = 1
    signs: torch.Tensor | None = None
    permutation: torch.Tensor | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"Unknown rotation {self.kind!r}. Known are {', '.join(KINDS)}.")
        if self.kind != "none":
            _dense(family_of(self.kind), self.block)
        if (self.kind == "hadamard_random") != (self.signs is not None):
            raise ValueError(f"Signs belong to hadamard_random and to no other rotation, not to {self.kind}.")
        if (self.kind == "zigzag_hadamard") != (self.permutation is not None):
            raise ValueError(f"A permutation belongs to zigzag_hadamard and to no other rotation, not to {self.kind}.")

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> x R, computed in fp32, in x's dtype. For activations and, along their columns, weights."""
        if self.kind == "none":
            return x
        self._check(x)
        y = x if self.permutation is None else x.index_select(-1, self.permutation.to(x.device))
        return rotate(y, self._signs(x), self.block, family_of(self.kind))

    def undo(self, x: torch.Tensor) -> torch.Tensor:
        """x R -> x."""
        if self.kind == "none":
            return x
        self._check(x)
        y = rotate(x, self._signs(x), self.block, family_of(self.kind), True)
        return y if self.permutation is None else y.index_select(-1, self.permutation.argsort().to(x.device))

    def _check(self, x: torch.Tensor) -> None:
        if x.shape[-1] % self.block:
            raise ValueError(f"A rotation in blocks of {self.block} does not fit {x.shape[-1]} channels.")

    def _signs(self, x: torch.Tensor) -> torch.Tensor | None:
        return None if self.signs is None else self.signs.to(x.device)

    def spread(self, squares: torch.Tensor) -> torch.Tensor:
        """Mean squares [K] of channels before R -> after it, the mean of each block: exact where channels do not correlate."""
        if self.kind == "none":
            return squares
        order = squares if self.permutation is None else squares[self.permutation.to(squares.device)]
        return order.reshape(-1, self.block).mean(1).repeat_interleave(self.block)


def rotation(kind: str, columns: int, amax: torch.Tensor | None = None, seed: int = 0) -> Rotation:
    """The rotation of a kind for a layer of K columns; amax [K], the largest magnitude of each input channel, is what
    zigzag_hadamard sorts by. ValueError where no block divides K."""
    if kind == "none":
        return Rotation("none")
    block = block_of(kind, columns) if kind in KINDS else 1
    if block is None:
        sizes = ", ".join(str(size) for size in BLOCKS[family_of(kind)])
        raise ValueError(f"{kind} needs a multiple of one of {sizes} input channels, the layer has {columns}.")
    signs = permutation = None
    if kind == "hadamard_random":
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, (columns,), generator=generator).float() * 2 - 1
    if kind == "zigzag_hadamard":
        if amax is None or amax.shape != (columns,):
            got = "none" if amax is None else [*amax.shape]
            raise ValueError(f"zigzag_hadamard needs the largest magnitude of each of {columns} channels, got {got}.")
        permutation = zigzag(amax, block)
    return Rotation(kind, block, signs, permutation)


def zigzag(amax: torch.Tensor, block: int) -> torch.Tensor:
    """Permutation [K]: the channels by falling amax [K] go to blocks 0, 1 .. last, last .. 1, 0, and so on."""
    count = len(amax) // block
    order = amax.float().cpu().argsort(descending=True, stable=True).reshape(block, count)
    order[1::2] = order[1::2].flip(1)
    return order.T.flatten()
