"""What tests of the quantizers compare with: rows of known distributions, and Q4_K as GGUF's reference makes it."""

import torch

KINDS = ("gauss", "laplace", "student5")


def rows(kind: str, n: int, k: int, seed: int = 0) -> torch.Tensor:
    """[n, k] of independent entries."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, k, generator=generator)
    if kind == "laplace":
        u = torch.rand(n, k, generator=generator) - 0.5
        return -u.sign() * torch.log1p(-2 * u.abs() + 1e-7)
    if kind == "student5":
        return x / (torch.randn(5, n, k, generator=generator).square().sum(0) / 5).sqrt()
    return x


def planted(tokens: int, channels: int, outliers: dict[int, float], seed: int = 0) -> torch.Tensor:
    """Inputs [tokens, channels] of unit size but for the channels of `outliers`, which are that many times as large."""
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(seed + 1000))
    for channel, size in outliers.items():
        x[:, channel] *= size
    return x


def relative_mse(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).square().sum() / want.double().square().sum())


def _affine(x, weights, levels=15, first=-1.0, step=0.1, steps=20):
    """Scale and minimum (<= 0) of each run of x [M, 32]: of the range first, then the weighted least squares after each
    of steps + 1 roundings with a stretched range, as far as they lower the weighted squared error."""
    low, high = x.amin(1).clamp_max(0), x.amax(1)
    width = torch.where(high > low, high - low, 1.0)
    sw, sx = weights.sum(1), (weights * x).sum(1)

    def miss(codes, scale, low):
        return (weights * (scale[:, None] * codes + low[:, None] - x).square()).sum(1)

    codes = ((x - low[:, None]) * (levels / width)[:, None]).round().clamp(0, levels)
    best_scale, best_low = width / levels, low
    best = miss(codes, best_scale, best_low)
    for i in range(steps + 1):
        codes = ((x - low[:, None]) * ((first + step * i + levels) / width)[:, None]).round().clamp(0, levels)
        sl, sll, sxl = (weights * codes).sum(1), (weights * codes * codes).sum(1), (weights * codes * x).sum(1)
        det = sw * sll - sl * sl
        scale, bottom = (sw * sxl - sx * sl) / det, (sll * sx - sl * sxl) / det
        scale, bottom = torch.where(bottom > 0, sxl / sll, scale), bottom.clamp_max(0)
        error = miss(codes, scale, bottom)
        better = (det > 0) & (error < best)
        best = torch.where(better, error, best)
        best_scale, best_low = torch.where(better, scale, best_scale), torch.where(better, bottom, best_low)
    return torch.where(high > low, best_scale, 0.0), -best_low


def q4_k_bytes(x: torch.Tensor) -> torch.Tensor:
    """x [N, K], K a multiple of 256 -> bytes [N, K / 256 * 144] as llama.cpp's quantize_row_q4_K_ref makes them (no
    importance matrix): weights root mean square + |x|, the search above, then scales and minima rounded to six bits."""
    runs = x.reshape(-1, 32).float()
    weights = runs.square().mean(1, keepdim=True).sqrt() + runs.abs()
    scale, minimum = (part.reshape(-1, 8) for part in _affine(runs, weights))
    top = [part.amax(1, keepdim=True) for part in (scale, minimum)]
    sixths = [
        (part * torch.where(peak > 0, 63 / peak, 0.0)).round().clamp(0, 63).to(torch.uint8)
        for part, peak in zip((scale, minimum), top, strict=True)
    ]
    d, dmin = ((peak / 63).half() for peak in top)
    step, offset = (half.float() * six.float() for half, six in zip((d, dmin), sixths, strict=True))
    codes = ((x.reshape(-1, 8, 32) + offset[..., None]) / torch.where(step > 0, step, 1.0)[..., None]).round()
    codes = codes.clamp(0, 15).to(torch.uint8)
    six, lows = sixths
    packed = torch.cat(
        (
            six[:, :4] | six[:, 4:] >> 4 << 6,
            lows[:, :4] | lows[:, 4:] >> 4 << 6,
            six[:, 4:] & 15 | (lows[:, 4:] & 15) << 4,
        ),
        1,
    )
    pairs = codes.reshape(-1, 4, 2, 32)
    nibbles = (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)
    blocks = torch.cat((d.view(torch.uint8), dmin.view(torch.uint8), packed, nibbles), 1)
    return blocks.reshape(x.shape[0], -1)
