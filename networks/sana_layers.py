"""Layers of SANA-Video's transformer: linear and cross attention, the feed-forward with its convolution over time, and the
rotary positions. Tokens are [B, N, C] in row-major order of their grid (T, H, W)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from ..kernels.conv.depthwise_conv import depthwise_conv
from ..kernels.conv.temporal_conv import temporal_conv
from ..kernels.linear.linear_attention import linear_attention

EPS, QK_EPS = 1e-15, 1e-5
THETA = 10000.0
CHUNK = "tessera_chunk"  # in transformer_options: the Chunk that this call computes
Grid = tuple[int, int, int]  # (T, H, W) in tokens


@dataclass(frozen=True)
class Sizes:
    """hidden: channels inside the feed-forward; text: width of the text's states."""

    channels: int = 16
    heads: int = 20
    head: int = 112
    layers: int = 20
    cross_heads: int = 20
    text: int = 2304
    hidden: int = 6720
    patch: tuple[int, int, int] = (1, 2, 2)
    bias: bool = False
    qk_norm: bool = True
    eps: float = 1e-6

    @property
    def width(self) -> int:
        return self.heads * self.head


class Chunk(Protocol):
    """The clip before the frames that one call computes, block by block, and what these leave behind. options: the call's
    transformer_options, with its block_index."""

    def attend(self, options: dict[str, Any], q, k, v, q_rot, k_rot) -> torch.Tensor:
        """[B, H, N, D] each, as linear_attention takes them -> [B, H, N, D], over this chunk and what it may see."""
        ...

    def frame_before(self, options: dict[str, Any], x: torch.Tensor, frames: int) -> torch.Tensor | None:
        """x [B, T H W, C] of `frames` frames enters this block's convolution over time -> the frame that entered last before
        it [B, H W, C]; None at the start."""
        ...


def softmax_attention(q, k, v, heads: int, mask=None, transformer_options=None) -> torch.Tensor:
    """q [B, N, H D], k, v [B, M, H D] -> [B, N, H D]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class TokenConv(nn.Conv2d):
    """A convolution whose weights are those of a Conv2d and whose input are tokens."""

    def forward(self, x, *where):
        return self.product(self.weight, self.bias, x, *where)

    def product(self, weight, bias, x, *where) -> torch.Tensor:
        raise NotImplementedError


class PointConv(TokenConv):
    """1 x 1: x [B, N, C] -> [B, N, C']."""

    def product(self, weight, bias, x):
        return F.linear(x, weight.flatten(1), bias)


class GatedDepthConv(TokenConv):
    """3 x 3 of each channel, halves (a, g) -> a silu(g): x [B T, H W, 2 C], sides (H, W) -> [B T, H W, C]."""

    def product(self, weight, bias, x, sides):
        return depthwise_conv(x, weight[:, 0], bias, list(sides), "silu", True)


class FrameConv(TokenConv):
    """Over three frames: x [B, T S, C], T frames, the frame before [B, S, C] or None -> [B, T S, C]."""

    def product(self, weight, bias, x, frames, before):
        return temporal_conv(x, weight[..., 0], bias, frames, before)


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.conv_inverted = PointConv(width, 2 * hidden, 1)
        self.conv_depth = GatedDepthConv(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = PointConv(hidden, width, 1, bias=False)
        self.conv_temp = FrameConv(width, width, (3, 1), padding=(1, 0), bias=False)

    def forward(self, x, grid: Grid, transformer_options):
        """x [B, N, C] -> [B, N, C]."""
        frames, *sides = grid
        y = F.silu(self.conv_inverted(x)).unflatten(1, (frames, -1)).flatten(0, 1)
        y = self.conv_point(self.conv_depth(y, sides)).unflatten(0, (-1, frames)).flatten(1, 2)
        chunk = transformer_options.get(CHUNK)
        before = None if chunk is None else chunk.frame_before(transformer_options, y, frames)
        return y + self.conv_temp(y, frames, before)


class Attention(nn.Module):
    def __init__(self, sizes: Sizes, heads: int, bias: bool):
        super().__init__()
        width, self.heads = sizes.width, heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(width, QK_EPS) if sizes.qk_norm else nn.Identity() for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def rows(self, x, source):
        """q, k, v, heads together."""
        return self.norm_q(self.to_q(x)), self.norm_k(self.to_k(source)), self.to_v(source)


class LinearAttention(Attention):
    exact = True  # features and values in fp32; else in the dtype of the tokens, their sums still in fp32

    def forward(self, x, pe, transformer_options):
        """x [B, N, C], pe (cos, sin) [N, 1, D / 2] -> [B, N, C]."""
        q, k, v = (row.unflatten(-1, (self.heads, -1)) for row in self.rows(x, x))
        if self.exact:
            q, k, v = q.float(), k.float(), v.float()
        q, k = q.relu(), k.relu()
        given = [row.transpose(1, 2) for row in (q, k, v, rotated(q, pe), rotated(k, pe))]  # [B, H, N, D]
        chunk = transformer_options.get(CHUNK)
        if chunk is None:
            out = linear_attention(*given, "relu", "sum", EPS)[0]
        else:
            out = chunk.attend(transformer_options, *given)
        return self.to_out[0](out.transpose(1, 2).flatten(2).to(x.dtype))


class CrossAttention(Attention):
    attend: Callable[..., torch.Tensor] = staticmethod(softmax_attention)

    def forward(self, x, txt, mask, transformer_options):
        """x [B, N, C], txt [B, M, C], mask [B, 1, 1, M] or None, added to scores -> [B, N, C]."""
        q, k, v = self.rows(x, txt)
        return self.to_out[0](self.attend(q, k, v, self.heads, mask=mask, transformer_options=transformer_options))


def rotated(x: torch.Tensor, pe: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """x [B, N, H, D], its pairs of neighbours turned by pe (cos, sin) [N, 1, D / 2], in x's dtype."""
    cos, sin = pe
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


def positions(head: int, grid: Grid, options: dict[str, Any], device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [N, 1, head / 2] in fp32: pairs of time first, then of rows and of columns. options: core's
    rope_options, which stretch and shift an axis."""
    side, tables = 2 * (head // 6), []
    for name, dim, length in zip("tyx", (head - 2 * side, side, side), grid, strict=True):
        place = torch.arange(length, dtype=torch.float64) * options.get(f"scale_{name}", 1.0)
        place = place + options.get(f"shift_{name}", 0.0)
        angles = torch.outer(place, THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim))
        tables.append(torch.stack((angles.cos(), angles.sin())).float().to(device))  # an axis at a time: few numbers
    t, y, x = tables
    shape = (2, *grid, -1)
    whole = (t[:, :, None, None].expand(shape), y[:, None, :, None].expand(shape), x[:, None, None].expand(shape))
    cos, sin = torch.cat(whole, -1).flatten(1, 3)[:, :, None]
    return cos, sin


def scaled(x: torch.Tensor, factor: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
    """x [B, N, C] times factor, plus shift [B, M, C], M = 1, frames or N."""
    y = x.unflatten(1, (factor.shape[1], -1)) * factor[:, :, None]
    return (y if shift is None else y + shift[:, :, None]).flatten(1, 2)
