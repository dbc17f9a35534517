"""Pictures of sparse masks: the share of pairs that is looked at, in cells of neighbouring queries and keys, at most
CELLS a side. Where the pattern follows from the layout a picture is made when somebody asks for it, else from the lists
of one call; neither holds queries, keys or values."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

CELLS = 96
RULE_PAIRS = 1 << 24  # compared for one picture; of larger layouts each cell shows evenly chosen queries
Inside = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # distances along t, y, x -> allowed
AS_GIVEN = "tokens as the model has them"
WHOLE_BLOCKS = "Computed are whole blocks of tokens, wherever they hold one of these pairs."
PATCHES = "image tokens in patches, then all others"


@dataclass(frozen=True)
class Picture:
    """shares [R, C] in 0..1 of rows of queries and columns of keys, or what makes them later. heads: which ones they
    are of; order: how the tokens lie; note: what is looked at besides."""

    shares: torch.Tensor | Callable[[], torch.Tensor]
    heads: str = "all heads alike"
    order: str = AS_GIVEN
    note: str = ""


def lengths(tokens: int, size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """fp32 [ceil(tokens / size)]: tokens of each block."""
    first = size * torch.arange(-(-tokens // size), device=device)
    return (tokens - first).clamp(max=size).float()


def pooled(shares: torch.Tensor, heights: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """Shares [n, m] of block pairs, blocks of heights [n] and widths [m] tokens -> [R, C] fp32 of cells that hold whole
    blocks, as evenly many as there are. Waits for no GPU."""
    rows, columns = (_cells(x) for x in (heights, widths))
    return rows @ shares.float() @ columns.T / (rows.sum(1)[:, None] * columns.sum(1))


def _cells(lengths: torch.Tensor) -> torch.Tensor:
    """fp32 [cells, n]: tokens of each block in its cell."""
    n = len(lengths)
    count = min(CELLS, n)
    number = torch.arange(n, device=lengths.device) * count // n
    return (number == torch.arange(count, device=lengths.device)[:, None]) * lengths


def _cell_of(tokens: int) -> torch.Tensor:
    """int64 [tokens]: the cell of each."""
    return torch.arange(tokens) * min(CELLS, tokens) // tokens


def listed_shares(listed: torch.Tensor, image: int, others: int, block: tuple[int, int]) -> torch.Tensor:
    """listed [n, m]: shares of the blocks of image queries by blocks of keys that image tokens alone fill, from the
    first one; block (queries, keys), tokens. All other keys and all other queries are seen, and see, in full. -> [R, C]."""
    device, (bq, bk) = listed.device, block
    held = min(listed.shape[1] * bk, image)  # what fills no block of its own stands with the others
    heights = [lengths(image, bq, device), lengths(others, bq, device)]
    widths = [lengths(held, bk, device), lengths(image + others - held, bk, device)]
    every = listed.new_ones(sum(map(len, heights)), sum(map(len, widths)), dtype=torch.float32)
    every[: listed.shape[0], : listed.shape[1]] = listed
    return pooled(every, torch.cat(heights), torch.cat(widths))


def segment_shares(label: torch.Tensor) -> torch.Tensor:
    """label int64 [N]: segment of each token, those below 0 see all and are seen by all. -> [R, C], exact."""
    cell, free = _cell_of(len(label)), label < 0
    cells = int(cell[-1]) + 1
    names, number = label[~free].unique(return_inverse=True)
    held = torch.zeros(cells, len(names), dtype=torch.float64)
    held.view(-1).index_add_(0, cell[~free] * len(names) + number, torch.ones(len(number), dtype=torch.float64))
    own, size = held.sum(1), cell.bincount(minlength=cells).double()
    area = size[:, None] * size
    return ((held @ held.T + area - own[:, None] * own) / area).float()


def rule_shares(coords: torch.Tensor, inside: Inside) -> torch.Tensor:
    """coords int32 [N, 3]: place of each token, t = -1 for those that see all and are seen by all. -> [R, C]."""
    n, free, cell = len(coords), coords[:, 0] < 0, _cell_of(len(coords))
    axes = coords.T.contiguous()
    cells = int(cell[-1]) + 1
    size = cell.bincount(minlength=cells).float()
    room = max(1, RULE_PAIRS // (n * cells))
    rows = []
    for queries in torch.arange(n).split([int(s) for s in size]):
        queries = queries[torch.linspace(0, len(queries) - 1, min(room, len(queries))).round().long()]
        seen = inside(*((x[queries, None] - x).abs_() for x in axes)) | free[queries, None] | free
        rows.append(torch.zeros(cells).index_add_(0, cell, seen.sum(0).float()) / (size * len(queries)))
    return torch.stack(rows)
