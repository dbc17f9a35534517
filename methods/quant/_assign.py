"""The nearest entry of a sorted code book, and the scale of each group that suits it best.

Both go through a table of fine bins: u = w / scale falls into bin floor(u * BINS / span), and a bin knows the entry that
its centre is nearest to. The search reads the entry's value there (its error is that of a bin, a 4,096th of the span);
the final codes compare once more with the one boundary that a bin may hold, so they are exact.
"""

from dataclasses import dataclass

import torch

BINS = 4096
REACH = 2.0  # u beyond this many times the largest entry is clamped
TINY = 1e-38
FACTORS = [0.8 + 0.05 * i for i in range(7)]  # of the inverse scales that a search tries


@dataclass(frozen=True, eq=False)
class Book:
    """A sorted table [C] with the lookups that go with it. boundaries [C - 1]: half way between entries."""

    table: torch.Tensor
    entries: list[float]
    boundaries: torch.Tensor
    step: float  # of a bin
    low: torch.Tensor  # int32 [2 * BINS + 2], entry at a bin's left edge
    values: torch.Tensor  # [2 * BINS + 2], value at its centre
    single: bool  # no bin holds two boundaries

    @classmethod
    def of(cls, table: torch.Tensor) -> "Book":
        """table [C], ascending."""
        table = table.float()
        boundaries = (table[1:] + table[:-1]) / 2
        entries = table.tolist()
        step = max(TINY, abs(entries[0]), abs(entries[-1])) * REACH / BINS
        edges = (torch.arange(2 * BINS + 2, device=table.device) - BINS) * step
        slack = step * 1e-3  # u / step is rounded: a u just below an edge may fall into the next bin
        low = torch.bucketize(edges - slack, boundaries, out_int32=True)
        high = torch.bucketize(edges + step + slack, boundaries, out_int32=True)
        values = table[torch.bucketize(edges + step / 2, boundaries)]
        return cls(table, entries, boundaries, step, low, values, bool((high - low).max() <= 1))

    def _bins(self, x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        """x [..., g], inverse [..., 1] of the scales -> bin of each, int32, flat."""
        u = torch.addcmul(x.new_full((1,) * x.ndim, BINS), x, inverse / self.step)
        return u.clamp_(0, 2 * BINS + 1).to(torch.int32).flatten()

    def nearly(self, x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        """Values [..., g] of entries next to x * inverse, up to the width of a bin."""
        return self.values.index_select(0, self._bins(x, inverse)).view_as(x)

    def codes(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """x [..., g] and scales [...] -> int32 [..., g], the nearest entry; a half goes to the lower one."""
        inverse = _inverse(scale).unsqueeze(-1)
        if not self.single:
            return torch.bucketize(x * inverse, self.boundaries, out_int32=True)
        code = self.low.index_select(0, self._bins(x, inverse))
        upper = torch.cat((self.boundaries, self.boundaries.new_full((1,), torch.inf)))
        return code.view_as(x) + (x * inverse > upper.index_select(0, code).view_as(x))


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 where that is no number."""
    return (1 / scale).nan_to_num(0, 0, 0)


def _candidates(x: torch.Tensor, weights: torch.Tensor | None, book: Book):
    """Inverse scales [..., 1] that a search tries, and the weight of largest magnitude [..., 1] that most of them put on
    one end of the table, times some factor. Where some weights matter more, the one whose square weighs most is also put
    on each of the larger entries, to be met exactly."""
    peak = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    bases = [_inverse(peak / end) for end in (book.entries[-1], book.entries[0])]
    inverses = [(base, factor) for base in bases for factor in FACTORS]
    if weights is not None:
        heavy = x.gather(-1, (x.square() * weights).argmax(-1, keepdim=True))
        large = max(abs(entry) for entry in book.entries)
        inverses += [(_inverse(heavy), entry) for entry in book.entries if abs(entry) > 0.3 * large]
    return inverses, peak


def search_scale(x: torch.Tensor, weights: torch.Tensor | None, book: Book) -> torch.Tensor:
    """Scale [...] of each group of x [..., g], of either sign: a negative one turns the table round. With the entries t of
    a candidate fixed, the best scale is s = <x, t> / <t, t> in the products that `weights` (as x, or [G, g]; importance
    >= 0) define, and leaves <x, x> - <x, t>^2 / <t, t>: the largest gain wins."""
    inverses, peak = _candidates(x, weights, book)
    wx = x if weights is None else x * weights
    scale = (peak / book.entries[-1]).squeeze(-1)
    best = torch.zeros_like(scale)
    for base, factor in inverses:
        t = book.nearly(x, base * factor)
        along = (wx * t).sum(-1)
        size = (t.square_() if weights is None else t.square_().mul_(weights)).sum(-1).clamp_min_(TINY)
        gain = along * along / size
        better = gain > best
        best = torch.where(better, gain, best)
        scale = torch.where(better, along / size, scale)
    return scale


def refit_table(
    x: torch.Tensor, weights: torch.Tensor | None, scale: torch.Tensor, codes: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """Each entry at the centre of mass of what it stands for: sum h s x / sum h s^2 over the elements of x [S, g] with its
    code; an entry that nothing takes stays."""
    s = scale.unsqueeze(-1).expand_as(x)
    hs = s if weights is None else s * weights
    hot = torch.nn.functional.one_hot(codes.flatten().long(), len(table)).float()  # of a sample: C floats an element
    sums = torch.stack(((hs * x).flatten(), (hs * s).flatten())) @ hot  # [2, C]
    return torch.where(sums[1] > TINY, sums[0] / sums[1].clamp_min(TINY), table)


def fit_table(x: torch.Tensor, weights: torch.Tensor | None, table: torch.Tensor, rounds: int) -> torch.Tensor:
    """Lloyd's alternation on sampled groups x [S, g]: scales and codes of the table, then the table of the codes, each time
    1.8 times as far as the centres say (it settles in half the rounds). The table of least weighted error among those
    met; its largest magnitude stays."""
    largest, best, kept = table.abs().max(), torch.inf, table
    for _ in range(rounds):
        book = Book.of(table)
        scale = search_scale(x, weights, book)
        codes = book.codes(x, scale)
        error = weighted(x - table.index_select(0, codes.flatten()).view_as(x) * scale.unsqueeze(-1), weights)
        if error < best:
            best, kept = error, table
        table = (table + 1.8 * (refit_table(x, weights, scale, codes, table) - table)).sort().values
        table = table * (largest / table.abs().max().clamp_min(TINY))
    return kept


def weighted(difference: torch.Tensor, weights: torch.Tensor | None) -> float:
    """Sum of squares of [..., g], with the weights of its elements."""
    square = difference.square()
    return float((square if weights is None else square * weights).sum())
