"""Random lists and inputs for the block-sparse kernels, and what they must equal: attention over an explicit mask."""

import math

import torch

SHAPES = [  # B, H, Hkv, Nq, Nk, D, block_m, block_n
    (1, 1, 1, 1, 1, 8, 64, 64),  # one token
    (2, 2, 2, 70, 70, 72, 32, 16),  # head 64 + 16, tails
    (1, 4, 2, 65, 90, 112, 64, 32),  # grouped heads, head padded to 128, queries unlike keys
    (1, 2, 1, 150, 128, 64, 128, 64),  # whole blocks, two tiles of the kernel in each
]


def lists(b, h, nq, nk, density=0.5):
    """Random ascending lists; the padding behind each list names blocks that must not count."""
    pick = torch.rand(b, h, nq, nk) < density
    order = torch.where(pick, torch.arange(nk), nk + torch.arange(nk)).sort(-1).values % nk
    return order.int(), pick.sum(-1).int()


def make(shape, device, dtype=torch.float32, heads=None):
    b, h, hkv, nq, nk, d, block_m, block_n = shape
    q = torch.randn(b, nq, h, d, device=device).to(dtype).transpose(1, 2)  # token-major, as ComfyUI's views are
    k = torch.randn(b, nk, 2, hkv, d, device=device).to(dtype)[:, :, 0].transpose(1, 2)  # of one packed projection
    v = torch.randn(b, hkv, nk, d, device=device).to(dtype)  # other strides than k's
    idx, cnt = lists(b, heads or h, -(-nq // block_m), -(-nk // block_n))
    return q, k, v, idx.to(device), cnt.to(device)


def rule_inputs(shape, device, per_head):
    """make() with a mode for each entry and random coordinates, some of tokens without a place; the fourth column
    of those of keys must not count."""
    q, k, v, idx, cnt = make(shape, device, heads=None if per_head else 1)
    mode = torch.randint(0, 2, idx.shape, device=device).to(torch.int8)
    qc, kc = (torch.randint(-1, 5, size, device=device).int() for size in ((shape[3], 3), (shape[4], 4)))
    return q, k, v, idx, cnt, mode, qc, kc


def expand(idx, cnt, blocks, tokens, allowed_pairs=None, mode=None):
    """The lists as a bool mask [B, H, Nq, Nk]."""
    nk = -(-tokens[1] // blocks[1])
    mask = torch.zeros(*idx.shape[:3], nk, 2, dtype=torch.bool, device=idx.device)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in idx.shape[:3])).view(-1, 3).tolist():
        for slot in range(int(cnt[b, h, i])):
            mask[b, h, i, idx[b, h, i, slot], 0] = mode is None or bool(mode[b, h, i, slot] == 0)
            mask[b, h, i, idx[b, h, i, slot], 1] = True
    mask = mask.repeat_interleave(blocks[0], 2).repeat_interleave(blocks[1], 3)[:, :, : tokens[0], : tokens[1]]
    partly = mask[..., 1] if allowed_pairs is None else mask[..., 1] & allowed_pairs
    return mask[..., 0] | partly


def exact(q, k, v, mask, bias=None, scale=None):
    """fp64 attention over an explicit mask -> out, lse; what sees nothing gives 0 and -inf. Differentiable."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    score = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        mask = mask & ~bias.isneginf()
        score = score + torch.where(bias.isneginf(), 0.0, bias)
    score = score.masked_fill(~mask, -math.inf)
    level = score.logsumexp(-1)
    return (score - level.nan_to_num(neginf=0)[..., None]).exp() @ v, level
