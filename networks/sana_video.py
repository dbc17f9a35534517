"""SANA-Video's transformer (arXiv 2509.24695, section 3.1; SANA, arXiv 2410.10629, for its feed-forward), with the tensor
names of its release for diffusers.

    attention   q^ = relu(q), k^ = relu(k), q~ = R q^, k~ = R k^ (rotated):  o_i = (sum_j v_j k~_j^T) q~_i / (sum_j k^_j . q^_i)
    block       x += g1 Linear(mod(norm x));  x += Cross(x, text);  x += g2 FF(mod(norm x))
    FF          1 x 1 convolution, silu, gated 3 x 3, 1 x 1, then y + Conv_t(y) over three frames

The numerator's features are rotated and the denominator's are not, so that the sum of weights stays positive. A time step
may belong to a frame or to a token. A clip can be computed in chunks: see sana_layers.Chunk."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from .sana_layers import CrossAttention, FeedForward, Grid, LinearAttention, Sizes, positions, scaled

SINUSOID, RATE = 256, 10000.0
TEXT_EPS = 1e-5
MASKED = -10000.0  # added to the score of a word that does not count


class SanaVideoBlock(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.width
        self.norm1 = nn.LayerNorm(width, sizes.eps, elementwise_affine=False)
        self.attn1 = LinearAttention(sizes, sizes.heads, sizes.bias)
        self.attn2 = CrossAttention(sizes, sizes.cross_heads, True)
        self.norm2 = nn.LayerNorm(width, sizes.eps, elementwise_affine=False)
        self.ff = FeedForward(width, sizes.hidden)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))

    def modulation(self, vec: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """vec [B, M, 6 C] -> shift, scale, gate of attention, then of the feed-forward, [B, M, C] each."""
        return (self.scale_shift_table.to(vec) + vec.unflatten(-1, (6, -1))).unbind(2)

    def forward(self, img, txt, vec, pe, mask, grid, transformer_options):
        """img [B, N, C], txt [B, M, C] -> img."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(vec)
        rows = scaled(self.norm1(img), 1 + scale1, shift1)
        img = img + scaled(self.attn1(rows, pe, transformer_options), gate1)
        img = img + self.attn2(img, txt, mask, transformer_options)
        rows = scaled(self.norm2(img), 1 + scale2, shift2)
        return img + scaled(self.ff(rows, grid, transformer_options), gate2)


class _Projection(nn.Module):
    """Two Linears under diffusers' names."""

    def __init__(self, inside: int, width: int, act: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.linear_1, self.linear_2, self.act = nn.Linear(inside, width), nn.Linear(width, width), act

    def forward(self, x):
        return self.linear_2(self.act(self.linear_1(x)))


class _TimeEmbed(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": _Projection(SINUSOID, width, F.silu)})
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, t: torch.Tensor, dtype: torch.dtype):
        """t [B, M] -> vec [B, M, 6 C], embedded [B, M, C]."""
        half = SINUSOID // 2
        rates = torch.exp(-math.log(RATE) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        angles = t.float()[..., None] * rates
        embedded = self.emb["timestep_embedder"](torch.cat((angles.cos(), angles.sin()), -1).to(dtype))
        return self.linear(F.silu(embedded)), embedded


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


class SanaVideo(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes, width = sizes, sizes.width
        self.patch_embedding = nn.Conv3d(sizes.channels, width, sizes.patch, sizes.patch)
        self.time_embed = _TimeEmbed(width)
        self.caption_projection = _Projection(sizes.text, width, _gelu)
        self.caption_norm = nn.RMSNorm(width, TEXT_EPS)
        self.transformer_blocks = nn.ModuleList(SanaVideoBlock(sizes) for _ in range(sizes.layers))
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))
        self.norm_out = nn.LayerNorm(width, 1e-6, elementwise_affine=False)
        self.proj_out = nn.Linear(width, math.prod(sizes.patch) * sizes.channels)

    def grid(self, x: torch.Tensor) -> Grid:
        """x [B, C, T, H, W], of whole patches."""
        t, h, w = (side // part for side, part in zip(x.shape[2:], self.sizes.patch, strict=True))
        return t, h, w

    def denoise(self, x, timestep, context, attention_mask=None, transformer_options=None):
        """x [B, C, T, H, W] of whole patches; timestep [B], [B, T] or [B, N], 0 to 1000; context [B, M, text];
        attention_mask [B, M], 1 for words that count -> velocity like x."""
        options = {} if transformer_options is None else transformer_options
        grid = self.grid(x)
        img = self.patch_embedding(x).flatten(2).transpose(1, 2)
        vec, embedded = self.time_embed(timestep.reshape(len(timestep), -1), img.dtype)
        txt = self.caption_norm(self.caption_projection(context.to(img.dtype)))
        mask = None
        if attention_mask is not None:
            mask = ((1 - attention_mask.to(img)) * MASKED)[:, None, None]
        pe = positions(self.sizes.head, grid, options.get("rope_options") or {}, x.device)
        img = self.through(img, txt, vec, pe, mask, grid, options)
        shift, scale = (self.scale_shift_table.to(embedded) + embedded[:, :, None]).unbind(2)
        img = self.proj_out(scaled(self.norm_out(img), 1 + scale, shift))
        img = img.reshape(len(img), *grid, *self.sizes.patch, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return img.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def through(self, img, txt, vec, pe, mask, grid, options):
        """The blocks, and the hooks on them: patches_replace["dit"] as ComfyUI's own models call it."""
        hooks = options.get("patches_replace", {}).get("dit", {})
        options["total_blocks"], options["block_type"] = len(self.transformer_blocks), "double"
        for index, block in enumerate(self.transformer_blocks):
            options["block_index"] = index
            hook = hooks.get(("double_block", index))
            if hook is None:
                img = block(img, txt, vec, pe, mask, grid, options)
                continue

            def original_block(given, block=block):
                own = given.get("transformer_options", options)
                return {"img": block(given["img"], given["txt"], given["vec"], given["pe"], mask, grid, own)}

            given = {"img": img, "txt": txt, "vec": vec, "pe": pe, "transformer_options": options}
            img = hook(given, {"original_block": original_block})["img"]
        return img
