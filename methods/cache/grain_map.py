"""Rich and flat regions of pictures by entropy (D2iT, arXiv 2504.09454, section on the dynamic-grain encoder)."""

import math

import torch

from ...kernels.tokens.cell_entropy import cell_entropy


def region_entropy(x: torch.Tensor, region: int, sigma: float, bins: int) -> torch.Tensor:
    """x [B, C, H, W] in 0..1 -> mean over channels of each region's entropy [B, rows, columns] fp32. Regions at a border
    that is no multiple of `region` hold what there is."""
    x, (h, w) = x.float(), x.shape[-2:]
    rows, columns = -(-h // region), -(-w // region)
    found = x.new_empty(x.shape[0], rows, columns)
    for tops, height in _parts(h, region):
        for lefts, width in _parts(w, region):
            top, left = tops.start * region, lefts.start * region
            whole = x[..., top : top + len(tops) * height, left : left + len(lefts) * width]
            cells = whole.unflatten(3, (len(lefts), width)).unflatten(2, (len(tops), height)).permute(0, 2, 4, 1, 3, 5)
            entropy = cell_entropy(cells.reshape(-1, height * width), bins, sigma).view(cells.shape[:4]).mean(3)
            found[:, tops.start : tops.stop, lefts.start : lefts.stop] = entropy
    return found


def _parts(side: int, region: int) -> list[tuple[range, int]]:
    """(numbers of regions, their length): the whole ones, and the rest of the side."""
    whole, rest = divmod(side, region)
    parts = [(range(whole), region), (range(whole, whole + 1), rest)]
    return [(numbers, length) for numbers, length in parts if len(numbers) and length]


def grain_map(
    x: torch.Tensor, region: int, fine_ratio: float, sigma: float, bins: int, plain: bool = False
) -> torch.Tensor:
    """x [B, C, H, W] in 0..1 -> [B, H, W]: 1 in the fine_ratio of its regions with the highest entropy, of equal ones
    the first, else 0; plain: the entropy itself."""
    entropy = region_entropy(x, region, sigma, bins)
    values = entropy
    if not plain:
        flat = entropy.flatten(1)
        count = math.floor(fine_ratio * flat.shape[1] + 0.5)
        chosen = flat.argsort(dim=1, descending=True, stable=True)[:, :count]
        values = torch.zeros_like(flat).scatter_(1, chosen, 1.0).view_as(entropy)
    wide = values.repeat_interleave(region, 1).repeat_interleave(region, 2)
    return wide[:, : x.shape[-2], : x.shape[-1]]
