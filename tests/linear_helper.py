"""Linear attention written as a weighted sum over all pairs, in fp64."""

import torch

ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}  # the interpreter truncates to bf16
NAMES = ["kernel", "reference"]


def phi(x, feature_map):
    if feature_map == "relu":
        return torch.where(x > 0, x, 0.0)
    if feature_map == "elu1":
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    if feature_map == "softmax":
        return x.exp() / x.exp().sum(-1, keepdim=True)
    if feature_map == "hedgehog":
        return torch.cat((phi(x, "softmax"), phi(-x, "softmax")), -1)
    return x


def exact(
    q, k, v, feature_map, q_rot=None, k_rot=None, normalizer="sum", eps=1e-6, mask=None, rotate_mass=False, state=False
):
    """out [B, H, Nq, E] over an explicit pair mask [Nq, Nk]; with state, also the packed sums over all keys."""
    q, k, v = q.double(), k.double(), v.double()
    a, b = phi(q, feature_map), phi(k, feature_map)
    c, d = (a, b) if q_rot is None else (q_rot.double(), k_rot.double())
    mask = torch.ones(q.shape[2], k.shape[2], device=q.device) if mask is None else mask
    y = (c @ d.transpose(2, 3) * mask) @ v
    if rotate_mass:
        a, b = c, d
    total = (a @ b.transpose(2, 3) * mask).sum(-1, keepdim=True)
    if normalizer == "sum":
        y = y / (total + eps)
    if normalizer == "mean":
        y = y / k.shape[2] / (total / k.shape[2] + eps)
    if normalizer == "rms":
        y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt()
    packed = torch.cat(((d.transpose(2, 3) @ v).flatten(2), b.sum(2)), -1)
    return (y, packed) if state else y


def tracks(x):
    """Features relu(x) rotated by another angle for each token and pair of columns."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2], device=x.device)[:, None] / torch.arange(1, half + 1, device=x.device)
    even, odd = x.float().relu().unflatten(-1, (half, 2)).unbind(-1)
    turned = torch.stack((even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()), -1)
    return turned.flatten(-2).to(x.dtype)
