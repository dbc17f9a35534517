"""What control adapters do without kernels of their own: plain torch, the rival of each."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as sdpa


def segment_bias(q, k, v, ends, bias):
    """The bias as a mask of the keys, as core's attention takes one."""
    lengths = torch.tensor([stop - start for start, stop in zip([0, *ends], ends, strict=False)], device=q.device)
    return sdpa(q, k, v, attn_mask=bias.repeat_interleave(lengths, 1)[:, None, None].to(q.dtype))


def grouped_lora(x, down, up, ends, groups, scales, ranks, base):
    """Two linear layers a segment."""
    y = base.clone()
    for start, stop, group in zip([0, *ends], ends, groups, strict=False):
        if group >= 0:
            low = functional.linear(x[:, start:stop], down[group, : ranks[group]])
            y[:, start:stop] += scales[group] * functional.linear(low, up[group, :, : ranks[group]])
    return y


def shuffle_window(x, perm, qkv_weight, qkv_bias, proj_weight, proj_bias):
    """Indexing, one attention of four heads for four segments, indexing by the inverse."""
    b, length, d = x.shape
    place = perm.long()
    rows = x.flatten(1)[:, place].view(4 * b, length // 4, d)
    q, k, v = functional.linear(rows, qkv_weight, qkv_bias).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
    rows = functional.linear(sdpa(q, k, v).transpose(1, 2).flatten(2), proj_weight, proj_bias)
    return rows.reshape(b, -1)[:, place.argsort()].view(x.shape)


def cross_stream_conv(a, r, weight, bias, grid):
    """The convolution of a channels-first picture."""
    g = functional.gelu(r, approximate="tanh")
    image = g.transpose(1, 2).unflatten(2, grid)
    mixed = functional.conv2d(image, weight, bias, padding=1, groups=weight.shape[0])
    return functional.gelu(a, approximate="tanh") + 1.2 * mixed.flatten(2).transpose(1, 2), g


def pose_modulate(c, weight, bias, shift, scale, gate, eps, base, strength):
    """One operation after another."""
    y = functional.layer_norm(c, c.shape[2:], weight, bias, eps) * (1 + scale[:, None]) + shift[:, None]
    return base + strength * y, (1 + gate[:, None]) * y


PLAIN: dict[str, tuple[str, Callable[..., Any], bool]] = {  # kernel: (name, plain torch, memory bound)
    "segment_bias": ("masked SDPA", segment_bias, False),
    "grouped_lora": ("two linear layers", grouped_lora, False),
    "shuffle_window": ("index, SDPA, index", shuffle_window, False),
    "cross_stream_conv": ("conv2d", cross_stream_conv, True),
    "pose_modulate": ("layer_norm", pose_modulate, True),
}
