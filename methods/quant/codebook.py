"""Weights as 4- or 3-bit codes of a table and a scale for each group: twin-log tables (LRQ-DiT, arXiv 2508.03485),
refitted to the layer, and the symmetric integers they are measured against.

The twin-log quantizer compands both branches of w = s u alike, L = 2^(bits - 1) - 1:
    q = -L .. L,   value(q) = sign(q) L ((1 + mu)^(|q| / L) - 1) / mu,   w ~ s value(q)
mu = 0 is uniform: the integers -L .. L with s = max|w| / L. mu is chosen for each layer by the squared error, optionally
weighted by the mean square of each input channel (the expected error of the output). The refit then uses the code that is
left over (a longer upper branch), moves all entries to their centres of mass and lets a group's scale take either sign,
so that the longer branch serves the group's largest weight (our own; the paper's equations are not public).
"""

from dataclasses import dataclass

import torch

from ...kernels.quant.packed import TABLE_BITS, Packed, pack_codes
from ._assign import TINY, Book, fit_table, search_scale, weighted

MUS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
CODEC = {bits: codec for codec, bits in TABLE_BITS.items()}
SAMPLE = 1 << 17  # weights that choose mu and the table
ROUNDS = 30
CHUNK = {"cpu": 1 << 18}  # weights at a time, so that they stay in the cache; elsewhere as many as launches are worth
CHUNK_ELSEWHERE = 1 << 24
LARGEST = 1e15  # magnitude of a weight: squares stay within fp32
FLOOR = 1e-4  # of the mean importance: a channel that was silent while calibrating still counts a little


@dataclass(frozen=True)
class Fit:
    """How well a weight was met. error: squared, relative to the weight's; weighted_error: both weighted by importance;
    bits: of a weight, with scales and table; mu: of the twin-log table that it began with, None for integers."""

    error: float
    weighted_error: float
    bits: float
    mu: float | None = None


def twin_log_table(bits: int, mu: float, longer: bool = False) -> torch.Tensor:
    """[2^bits] ascending. Code 0 is one more step of the lower branch, which no symmetric encoder uses; `longer` makes it
    one more on the upper branch instead, both ends at L and -L."""
    length = 2 ** (bits - 1) - 1

    def branch(steps: int, count: int) -> torch.Tensor:
        u = torch.arange(1, count + 1, dtype=torch.float64) / steps
        return length * (u if mu == 0 else torch.expm1(u * torch.log1p(torch.tensor(float(mu)).double())) / mu)

    upper = branch(length + 1, length + 1) if longer else branch(length, length)
    lower = branch(length, length) if longer else branch(length, length + 1)
    return torch.cat((-lower.flip(0), torch.zeros(1), upper)).float()


def twin_log(
    weight: torch.Tensor,
    bits: int = 4,
    group: int = 64,
    importance: torch.Tensor | None = None,
    mu: float | None = None,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> tuple[Packed, Fit]:
    """weight [N, K], any float dtype, on its own device; importance [K] >= 0. mu None: the best of MUS. rounds of
    the refit; 0: the table of mu with the scales of the largest weights. Memory beyond the result is a few chunks."""
    check_weight(weight)
    x, h = _sample(weight, group, column_weights(importance, weight, group), seed)
    chosen = _best_mu(x, h, bits) if mu is None else float(mu)
    if not rounds:
        return _encode(weight, bits, group, importance, twin_log_table(bits, chosen), chosen, False, 1)
    table = fit_table(x, h, twin_log_table(bits, chosen, True).to(weight.device), rounds)
    return _encode(weight, bits, group, importance, table, chosen, True, 0)


def symmetric_int4(
    weight: torch.Tensor, group: int = 64, importance: torch.Tensor | None = None, search: bool = False
) -> tuple[Packed, Fit]:
    """The symmetric integers -7 .. 7: code minus 8, times a scale > 0 a group, max|w| / 7 or the searched one of least error.
    Without a search importance only weighs the report."""
    check_weight(weight)
    return _encode(weight, 4, group, importance, twin_log_table(4, 0), None, search, 1)


def rowwise_int8(weight: torch.Tensor, importance: torch.Tensor | None = None) -> tuple[Packed, Fit]:
    """Integers -127 .. 127 with one fp32 scale max|w| / 127 a row."""
    check_weight(weight)
    n, k = weight.shape
    h = column_weights(importance, weight, k)
    scale = torch.empty(n, 1, device=weight.device)
    data = torch.empty(n, k, dtype=torch.int8, device=weight.device)
    sums = _Sums(h)
    for rows in _chunks(weight):
        x = weight[rows].float()
        scale[rows] = x.abs().amax(1, keepdim=True) / 127
        q = (x / scale[rows].clamp_min(TINY)).round_().clamp_(-127, 127)
        data[rows] = q.to(torch.int8)
        sums.add(x.unsqueeze(1), (q * scale[rows]).unsqueeze(1))
    packed = Packed("int8", k, data.view(torch.uint8), scale, group=k)
    return packed, sums.fit(packed, None)


def check_weight(weight: torch.Tensor) -> None:
    """ValueError for what is no matrix of finite numbers."""
    if weight.ndim != 2 or not weight.numel() or not weight.is_floating_point():
        raise ValueError(f"A weight to quantize is a floating [N, K], got {str(weight.dtype)[6:]} {[*weight.shape]}.")
    low, high = weight.aminmax()
    if not (low > -LARGEST and high < LARGEST):  # false for NaN
        raise ValueError(
            f"The weight {[*weight.shape]} holds numbers that are not finite or above {LARGEST:.0e}; take another file."
        )


def column_weights(importance: torch.Tensor | None, weight: torch.Tensor, group: int) -> torch.Tensor | None:
    """importance [K] -> [G, group] of mean 1 on the weight's device, zero beyond K; None where all count alike. ValueError
    where it does not fit."""
    k = weight.shape[1]
    if importance is None:
        if k % group == 0:
            return None
        importance = torch.ones(k)
    if importance.shape != (k,) or not importance.isfinite().all() or importance.min() < 0:
        raise ValueError(f"Importances of {k} input channels must be finite and >= 0, got {[*importance.shape]}.")
    h = importance.to(weight.device, torch.float32)
    h = (h / h.mean().clamp_min(TINY)).clamp_min(FLOOR)
    return torch.nn.functional.pad(h, (0, -k % group)).reshape(-1, group)


class _Sums:
    """Squared errors and sizes over chunks."""

    def __init__(self, weights: torch.Tensor | None):
        self.weights = weights
        self.parts = [0.0] * 4  # error, size, and both weighted

    def add(self, x: torch.Tensor, near: torch.Tensor) -> None:
        """x and its quantized form [rows, G, g]."""
        plain = [weighted(x - near, None), weighted(x, None)]
        both = plain if self.weights is None else [weighted(x - near, self.weights), weighted(x, self.weights)]
        self.parts = [a + b for a, b in zip(self.parts, plain + both, strict=True)]

    def fit(self, packed: Packed, mu: float | None) -> Fit:
        error, size, weighted_error, weighted_size = self.parts
        stored = [part for part in (packed.data, packed.scale, packed.table) if part is not None]
        bits = 8 * sum(part.numel() * part.element_size() for part in stored) / (packed.data.shape[0] * packed.columns)
        return Fit(error / max(size, TINY), weighted_error / max(weighted_size, TINY), bits, mu)


def _chunks(weight: torch.Tensor):
    """Slices of rows."""
    rows = max(1, CHUNK.get(weight.device.type, CHUNK_ELSEWHERE) // weight.shape[1])
    return (slice(i, min(i + rows, weight.shape[0])) for i in range(0, weight.shape[0], rows))


def _groups(rows: torch.Tensor, group: int) -> torch.Tensor:
    """[n, K] -> fp32 [n, G, group], padded with zeros."""
    return torch.nn.functional.pad(rows.float(), (0, -rows.shape[1] % group)).reshape(rows.shape[0], -1, group)


def _sample(weight: torch.Tensor, group: int, h: torch.Tensor | None, seed: int):
    """Groups [S, g] drawn from anywhere in the weight, all of a small one, and the weights of their elements or None."""
    n, g = weight.shape[0], -(-weight.shape[1] // group)
    most = max(1, SAMPLE // group)
    if n * g <= most:
        return _groups(weight, group).flatten(0, 1), None if h is None else h.repeat(n, 1)
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(n, (most,), generator=generator).to(weight.device)
    column = torch.randint(g, (most,), generator=generator).to(weight.device)
    places = column[:, None] * group + torch.arange(group, device=weight.device)  # [S, group]
    inside = places < weight.shape[1]
    x = weight[row[:, None], places.clamp_max(weight.shape[1] - 1)].float() * inside
    return x, None if h is None else h[column]


def _best_mu(x: torch.Tensor, h: torch.Tensor | None, bits: int) -> float:
    """Of MUS, the one whose table meets the groups x [S, g] best; the smallest of equals."""
    errors = []
    for mu in MUS:
        table = twin_log_table(bits, mu)[1:].to(x.device)
        scale = x.abs().amax(1) / table[-1]
        near = table.index_select(0, Book.of(table).codes(x, scale).flatten()).view_as(x) * scale[:, None]
        errors.append(weighted(x - near, h))
    return MUS[errors.index(min(errors))]


def _scale_dtype(weight: torch.Tensor, group: int, length: int) -> torch.dtype:
    """fp16, or bf16 where scales of such groups would leave fp16's normal numbers."""
    for rows in _chunks(weight):
        peak = _groups(weight[rows], group).abs().amax(-1) / length
        if peak.max() > 3e4 or peak.masked_fill(peak == 0, 1.0).min() < 1.3e-4:  # a search may halve or double them
            return torch.bfloat16
    return torch.float16


def _encode(
    weight: torch.Tensor,
    bits: int,
    group: int,
    importance: torch.Tensor | None,
    table: torch.Tensor,
    mu: float | None,
    search: bool,
    first: int,
) -> tuple[Packed, Fit]:
    """Codes of this table from `first` on, with searched scales or those of the largest weights. From 1 on it is odd, and
    so are its scales positive."""
    codec, length = CODEC[bits], 2 ** (bits - 1) - 1
    table = table.to(weight.device)
    book, h = Book.of(table[first:]), column_weights(importance, weight, group)
    dtype = _scale_dtype(weight, group, length)
    scales, data = [], []
    sums = _Sums(h)
    for rows in _chunks(weight):
        x = _groups(weight[rows], group)
        wanted = search_scale(x, h, book) if search else x.abs().amax(-1) / length
        scale = (wanted.abs() if first else wanted).to(dtype)
        codes = book.codes(x, scale.float()) + first
        near = table.index_select(0, codes.flatten()).view_as(x) * scale.float().unsqueeze(-1)
        near.view(len(near), -1)[:, weight.shape[1] :] = 0  # what pads the last group is never read
        sums.add(x, near)
        scales.append(scale)
        data.append(pack_codes(codes.flatten(1), codec, group))
    packed = Packed(codec, weight.shape[1], torch.cat(data), torch.cat(scales), table, group)
    return packed, sums.fit(packed, mu)
