"""Orthogonal Hadamard matrices in blocks of columns: checks, the torch form, the butterfly of the kernels.

sylvester, of 2^k columns: the Kronecker power of [[1, 1], [1, -1]]. regular, of 4^k columns: that of 1 - 2 J, J the
antidiagonal of ones of size 4; all its row sums are equal, so that a row of equal values keeps its size, where the first
column of a Sylvester matrix gathers them into one outlier. Both are divided by the root of their size, symmetric, and
so their own inverse.
"""

import torch

from .._triton import tl, triton

KINDS = ("sylvester", "regular")
CHUNK = 1 << 18  # elements turned at once on a CPU: they stay in the cache
WIDE = 1024  # columns of one program, unless a block has more
WIDEST = 4096


def check(columns: int, block: int, kind: str) -> None:
    """Raises ValueError for an unknown kind and a block that does not exist or does not divide the columns."""
    if kind not in KINDS:
        raise ValueError(f"Unknown rotation {kind!r}; choose sylvester or regular.")
    power = block.bit_length() - 1
    if block < 1 or block != 1 << power or (kind == "regular" and power % 2):
        sizes = "4, 16, 64, 256 and so on" if kind == "regular" else "powers of two"
        raise ValueError(f"Blocks of a {kind} Hadamard matrix are {sizes}, got {block}.")
    if columns % block:
        raise ValueError(f"Blocks of {block} do not divide {columns} columns; choose a smaller one.")


def check_signs(signs: torch.Tensor | None, columns: int) -> None:
    if signs is not None and tuple(signs.shape) != (columns,):
        raise ValueError(f"There are {columns} columns, and the signs are {[*signs.shape]}.")


def turned(x: torch.Tensor, block: int, kind: str) -> torch.Tensor:
    """x [M, K] H, each block of columns on its own, in fp32 (fp64: in fp64); x itself for blocks of 1.

    Two buffers serve all stages, each of which adds what lies `stride` apart."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    given = y = x.to(exact).contiguous()
    other, stride, size = torch.empty_like(y) if block > 1 else y, 1, 4 if kind == "regular" else 2
    while stride < block:
        parts, into = y.view(-1, size, stride).unbind(1), other.view(-1, size, stride)
        if kind == "regular":
            a, b, c, d = parts
            half = (a + b).add_(c + d).mul_(0.5)
            for i, part in enumerate((d, c, b, a)):
                torch.sub(half, part, out=into[:, i])
        else:
            torch.add(*parts, out=into[:, 0])
            torch.sub(*parts, out=into[:, 1])
        y, other, stride = other, torch.empty_like(y) if y is given else y, stride * size
    return y.mul_(block**-0.5) if kind == "sylvester" and block > 1 else y


def tile(block: int) -> int:
    """Columns that one program turns."""
    return max(WIDE, block)


@triton.jit
def butterfly(x, BC: tl.constexpr, LOG: tl.constexpr, REGULAR: tl.constexpr):
    """fp32 [BC] times the matrix of 2^LOG columns, in each block of so many."""
    if REGULAR:
        for i in tl.static_range(LOG // 2):
            y = tl.reshape(x, [BC // (4 * 4**i), 2, 2, 4**i])
            even, odd = tl.split(tl.permute(y, (0, 3, 1, 2)))
            a, c = tl.split(even)
            b, d = tl.split(odd)
            half = ((a + b) + (c + d)) * 0.5
            y = tl.join(tl.join(half - d, half - b), tl.join(half - c, half - a))
            x = tl.reshape(tl.permute(y, (0, 2, 3, 1)), [BC])
    else:
        for i in tl.static_range(LOG):
            y = tl.reshape(x, [BC // (2 * 2**i), 2, 2**i])
            a, b = tl.split(tl.permute(y, (0, 2, 1)))
            x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), [BC])
        if LOG > 0:
            x = x * (2.0 ** (-0.5 * LOG))
    return x
