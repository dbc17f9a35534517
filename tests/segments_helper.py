"""The explicit form of attention within segments, for the tests of the methods that use it."""

import math

import torch

from tessera.archs import Layout
from tessera.methods.attention.call import Answer, AttentionCall

SERVED = ("flux", "wan_meta", "sd3", "ltxv_meta", "qwen_image", "lumina2", "cosmos_predict2", "hunyuan_video",
          "pixart")  # fmt: skip


def layout(grid, before=0, after=0):
    n = math.prod(grid)
    return Layout(grid, slice(before, before + n), before + n + after)


def seen(label, free=-1):
    """Segments [N] -> the mask [N, N], written down from the definition."""
    return (label[:, None] == label[None]) | (label[:, None] == free) | (label[None] == free)


def whole(where, image, text="dense"):
    """Segments of the image tokens -> of all tokens of a layout."""
    label = torch.full((where.total,), -1 if text == "dense" else 10**6)
    label[where.image] = image
    return label


def masked(call, mask):
    """Dense attention of a call under a bool mask [N, N] and the call's own."""
    groups = call.q.shape[1] // call.k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (call.k, call.v))
    bias = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)[None, None]
    if call.mask is not None:
        bias = bias + call.key_bias()[:, None, None]
    return torch.nn.functional.scaled_dot_product_attention(call.q, k, v, bias.to(call.q.dtype), scale=call.scale)


class Masked:
    """A method by explicit masks: slow, and plainly right. label(grid, block number) -> segments of the image tokens,
    None: dense."""

    def __init__(self, label, text="dense"):
        self.label, self.text = label, text

    def begin(self):
        return None

    def attend(self, state, call):
        label = self.label(call.layout.grid, call.block.number)
        label = torch.zeros(call.layout.total) if label is None else whole(call.layout, label, self.text)
        return Answer(masked(call, seen(label)), 0.0, 0.0)


class Block:
    def __init__(self, number=0, count=4):
        self.number, self.count = number, count


def call_of(where, mask=None, block=0, count=4, heads=(2, 2), batch=2, keys=None):
    q = torch.randn(batch, heads[0], where.total, 16)
    k, v = torch.randn(2, batch, heads[1], where.total, 16)[:, :, :, :keys]
    return AttentionCall(q, k, v, mask, 0.25, "joint", where, Block(block, count), None)
