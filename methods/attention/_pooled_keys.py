"""CLEAR's downsampled keys (arXiv 2412.16112, section 3.3): every patch of factor x factor image keys, RoPE applied, and
its values become one key and one value more, which all image queries see wherever they stand:

    k_P = sum_j w_j k_j        v_P = sum_j w_j v_j        with weights w_j of the place j within its patch

w is 1 / factor^2 or learned by block. What follows is ours. A patch at a ragged edge is rescaled to the tokens it has.
A token with bias b counts as e^b tokens, in the patch and in its bias, which also may count a patch as all its tokens
(log-weight ln n) instead of as one key, so that its logit has the weight that a patch of equal tokens would have.
"""

import torch
import torch.nn.functional as F

from ...archs import Grid


def pooled_grid(grid: Grid, factor: int) -> Grid:
    """(T, H, W) of the patches; ragged ones at the far edges count."""
    return grid[0], -(-grid[1] // factor), -(-grid[2] // factor)


def _patches(x: torch.Tensor, grid: Grid, factor: int) -> torch.Tensor:
    """[..., T * H * W, D] -> [..., T, H / f, f, W / f, f, D], zeros beyond the edges."""
    _, height, width = grid
    x = x.unflatten(-2, grid)
    if height % factor or width % factor:
        x = F.pad(x, (0, 0, 0, -width % factor, 0, -height % factor))
    return x.unflatten(-2, (-1, factor)).unflatten(-4, (-1, factor))


def sizes(grid: Grid, factor: int) -> torch.Tensor:
    """fp32 [P], how many tokens each patch has."""
    ones = torch.ones(grid[0] * grid[1] * grid[2], 1)
    return _patches(ones, grid, factor).sum((-4, -2)).flatten()


def pool(
    x: torch.Tensor,
    grid: Grid,
    factor: int,
    counts: torch.Tensor,
    weight: torch.Tensor | None = None,
    shares: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [B, H, T * H * W, D]; counts: sizes() on x's device; weight [factor, factor] or None for the mean; shares fp32
    [B, T * H * W], what each token counts, or None for 1 -> [B, H, P, D] of x's dtype, summed in fp32 at least."""
    dtype, exact = x.dtype, torch.promote_types(x.dtype, torch.float32)
    total = counts.to(exact)
    if shares is not None:
        x = x.to(exact) * shares.to(exact)[:, None, :, None]
        total = _patches(shares[..., None].to(exact), grid, factor).sum((-4, -2)).flatten(1)[:, None]
    parts = _patches(x, grid, factor)
    if weight is None:
        summed = parts.sum((-4, -2), dtype=exact)
    else:  # place by place: no copy of x in the exact dtype
        weight = weight.to(exact) * factor**2
        summed = torch.zeros_like(parts[..., 0, :, 0, :], dtype=exact)
        for i, j in ((i, j) for i in range(factor) for j in range(factor)):
            summed += parts[..., i, :, j, :] * weight[i, j]
    return (summed.flatten(2, 4) / total.clamp_min(1e-30)[..., None]).to(dtype)


def pooled_bias(shares: torch.Tensor | None, grid: Grid, factor: int, counts: torch.Tensor, every: bool):
    """What is added to the logits of the patches, fp32 [P] or [B, P], None: nothing. every: a patch counts as all its
    tokens instead of as one."""
    if shares is None:
        return counts.log() if every else None
    total = _patches(shares[..., None], grid, factor).sum((-4, -2)).flatten(1)
    return (total if every else total / counts).log()
