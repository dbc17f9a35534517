"""Orders of a (T, H, W) token grid in which consecutive tokens are neighbours, so that a block of them is a small patch
and a spatial window touches few blocks (the reordering step of CLEAR, arXiv 2412.16112, of Sliding Tile Attention,
arXiv 2502.04507, and of LLSA, arXiv 2512.16615; the cut at whole blocks, which lets any grid have full blocks, and
Z-order on grids of any size are ours). x[order] brings tokens into an order, x[order][inverse(order)] undoes it. Axes
that a picture or a sequence lacks have length 1.
"""

import torch

Grid = tuple[int, int, int]


def inverse(order: torch.Tensor) -> torch.Tensor:
    """Permutation [N] -> the one that undoes it: x[order][inverse(order)] == x."""
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], dtype=order.dtype, device=order.device)
    return back


def coordinates(grid: Grid) -> torch.Tensor:
    """int64 [T * H * W, 3], the (t, y, x) of every token in row-major order."""
    return torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, 3)


def tile_order(grid: Grid, tile: Grid) -> torch.Tensor:
    """int64 [T * H * W]: position in the new order -> row-major token. Tiles (t, h, w) follow in row-major order, each
    contiguous; those at the far edges hold fewer tokens where the grid does not divide."""
    if min(tile) < 1:
        raise ValueError(f"A tile needs at least 1 token along each axis, got {tile}.")
    number = torch.zeros(grid[0] * grid[1] * grid[2], dtype=torch.int64)
    for at, size, step in zip(coordinates(grid).unbind(1), grid, tile, strict=True):
        number = number * -(-size // step) + at // step
    return number.argsort(stable=True)


def tile_shape(block: int, axes: int) -> Grid:
    """(t, h, w) of the tile nearest to a square, for axes=3 to a cube, that holds `block` tokens; block a power of two.
    The longer sides lie along w, then h: 16 gives (1, 4, 4) and (2, 2, 4), 64 (1, 8, 8) and (4, 4, 4)."""
    if block < 1 or block & (block - 1) or axes not in (1, 2, 3):
        raise ValueError(f"A tile needs a power of two of tokens and 1 to 3 axes, got {block} tokens, {axes} axes.")
    bits = block.bit_length() - 1
    sides = [1 << (bits + i) // axes for i in range(axes)]
    return (*([1] * (3 - axes)), *sides)  # type: ignore[return-value]


def zorder(grid: Grid) -> torch.Tensor:
    """int64 [T * H * W]: position along the Z curve -> row-major token. The bits of the coordinates are interleaved, x
    lowest; an axis takes part while it has bits. A grid of any size takes the order of the grid of powers of two that
    holds it. On squares and cubes of 2^n each aligned run of 4^i (8^i) tokens is one square (cube)."""
    if min(grid) < 1:
        raise ValueError(f"A grid needs at least 1 token along each axis, got {grid}.")
    code, free = torch.zeros(grid[0] * grid[1] * grid[2], dtype=torch.int64), 0
    at = coordinates(grid)
    for bit in range((max(grid) - 1).bit_length()):
        for axis in (2, 1, 0):
            if (grid[axis] - 1) >> bit:
                code |= (at[:, axis] >> bit & 1) << free
                free += 1
    return code.argsort()


def compact_order(
    grid: Grid, blocks: tuple[int, ...], weight: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> torch.Tensor:
    """int64 [T * H * W]: position in the new order -> row-major token. Each aligned run of blocks[i] tokens is compact,
    for each i; only the last run is shorter. The grid is cut in two at a whole number of blocks along its (weighted)
    longest axis, then each part again. weight: how much a step along t, y, x counts.
    """
    if not blocks or min(blocks) < 1:
        raise ValueError(f"Block sizes must be at least 1 token, got {blocks}.")
    at = coordinates(grid)
    n, widest = at.shape[0], max(grid)
    order, sizes = torch.arange(n), torch.tensor([n])
    for unit in sorted(blocks, reverse=True):
        while bool((sizes > unit).any()):
            part = torch.arange(len(sizes)).repeat_interleave(sizes)
            here, split = at[order], sizes > unit
            low, high = (
                torch.zeros(len(sizes), 3, dtype=torch.int64).scatter_reduce_(
                    0, part[:, None].expand(-1, 3), here, reduce, include_self=False
                )
                for reduce in ("amin", "amax")
            )
            axis = ((high - low) * torch.tensor(weight, dtype=torch.float64)).argmax(1)
            along = torch.where(split[part], here.gather(1, axis[part, None])[:, 0], 0)
            order = order[((part * widest + along) * n + order).argsort()]
            first = torch.where(split, (-(-sizes // unit) + 1) // 2 * unit, sizes)
            sizes = torch.stack([first, sizes - first], 1).flatten()
            sizes = sizes[sizes > 0]
    return order
