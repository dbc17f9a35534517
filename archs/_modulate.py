"""Tokens under a block's modulation, as TeaCache (arXiv 2411.19108) measures them, and timestep embeddings."""

from collections.abc import Sequence

import torch

Spans = Sequence[tuple[int, int | None, int]]  # tokens from, to; which row of the modulation they take


def under(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None = None, spans: Spans | None = None):
    """x [B, N, D] times 1 + scale plus shift; scale, shift [B, 1 or N or several, D].

    Several rows belong to spans of tokens; without spans the first row counts, which is the image's."""
    if spans:
        return torch.cat([under(x[:, a:b], scale[:, i : i + 1], _row(shift, i)) for a, b, i in spans], 1)
    if scale.shape[1] not in (1, x.shape[1]):
        scale, shift = scale[:, :1], _row(shift, 0)
    return x * (1 + scale) if shift is None else x * (1 + scale) + shift


def _row(shift: torch.Tensor | None, i: int) -> torch.Tensor | None:
    return None if shift is None else shift[:, i : i + 1]


def sinusoid(width: int, t: torch.Tensor) -> torch.Tensor:
    """t [N] -> [N, width]: cosines, then sines, of t at frequencies that fall from 1 to 1 / 10000."""
    rates = torch.pow(10000, -torch.arange(width // 2, dtype=torch.float32, device=t.device) / (width // 2))
    angles = torch.outer(t.float(), rates)
    return torch.cat((angles.cos(), angles.sin()), 1)


def double_block(model, arguments) -> torch.Tensor:
    """The image [B, N, D] after the first norm and modulation of a double block of the Flux kind."""
    block, vec = model.double_blocks[0], arguments["vec"]
    modulation = block.img_mod(vec)[0] if block.modulation else vec[0][0]
    image = block.img_norm1(arguments["img"])
    return under(image, modulation.scale, modulation.shift, arguments.get("modulation_dims_img"))
