"""FLUX with EasyControl as one masked sequence, written out: every token of [text; picture; conditions] goes through every
block, conditions see themselves only. Its own modules in fp32, nothing of the pack."""

import math

import torch
import torch.nn.functional as F


def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"].float(), w.get(f"{name}.bias", torch.zeros(1)).float())


def sinusoid(t, width=256):
    angles = 1000.0 * t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], -1)


def embed(w, name, x):
    return linear(w, f"{name}.out_layer", F.silu(linear(w, f"{name}.in_layer", x)))


def vector(w, t, y, guidance):
    out = embed(w, "time_in", sinusoid(t)) + embed(w, "vector_in", y.float())
    return out + embed(w, "guidance_in", sinusoid(guidance)) if guidance is not None else out


def rotated(x, ids, axes, theta):
    """x [B, H, N, D] turned by ids [N, 3]."""
    angles = torch.cat(
        [ids[:, i : i + 1].double() / theta ** (torch.arange(0, dim, 2).double() / dim) for i, dim in enumerate(axes)],
        -1,
    )
    pairs = x.double().reshape(*x.shape[:-1], -1, 2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2).float()


def rms(w, name, x):
    scale = w.get(f"{name}.weight", w.get(f"{name}.scale"))
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * scale.float()


def patches(x):
    b, c, h, w = x.shape
    x = F.pad(x, (0, w % 2, 0, h % 2), mode="circular")
    return F.unfold(x.float(), 2, stride=2).transpose(1, 2), ((h + 1) // 2, (w + 1) // 2)


def places(h, w, step=(1.0, 1.0), down=0):
    rows, columns = torch.meshgrid(torch.arange(h) * step[0] + down, torch.arange(w) * step[1], indexing="ij")
    return torch.stack([torch.zeros(h * w), rows.flatten(), columns.flatten()], -1)


class Condition:
    """latent [b, C, h, w] as the model sees it; loras: key -> tensor as a file has them."""

    def __init__(self, latent, loras, subject=False, strength=1.0, scale=1.0):
        self.latent, self.loras, self.subject, self.strength, self.scale = latent, loras, subject, strength, scale

    def delta(self, path, block, part, x):
        name = f"{path}.{block}.attn.processor.{part}_loras.0"
        down, up = self.loras[f"{name}.down.weight"].float(), self.loras[f"{name}.up.weight"].float()
        return self.scale * (x @ down.T) @ up.T


def modulation(w, name, vec, count):
    return linear(w, f"{name}.lin", F.silu(vec))[:, None].chunk(count, -1)


def norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def heads(x, count):
    return x.unflatten(-1, (3, count, -1)).permute(2, 0, 3, 1, 4)


def attend(q, k, v, bias):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def forward(network, x, t, context, y, guidance, conditions):
    """The stock network's output for x [B, C, H, W] beside these conditions."""
    w, p = dict(network.state_dict()), network.params
    count, axes = p.num_heads, p.axes_dim
    tokens, grid = patches(x)
    parts = [linear(w, "txt_in", context.float()), linear(w, "img_in", tokens)]
    ids = [torch.zeros(context.shape[1], 3), places(*grid)]
    for c in conditions:
        seen, (h, wd) = patches(c.latent.repeat(-(-x.shape[0] // len(c.latent)), 1, 1, 1)[: x.shape[0]])
        parts.append(linear(w, "img_in", seen))
        step = (1.0, 1.0) if c.subject else (grid[0] / h, grid[1] / wd)
        ids.append(places(h, wd, step, 64 if c.subject else 0))
    lengths = [part.shape[1] for part in parts]
    ids, total = torch.cat(ids), sum(lengths)
    vec, still = vector(w, t, y, guidance), vector(w, torch.zeros_like(t), y, guidance)
    bias = torch.zeros(total, total)
    start = lengths[0] + lengths[1]
    for c, n in zip(conditions, lengths[2:], strict=True):
        bias[start : start + n] = float("-inf")
        bias[:, start : start + n] = float("-inf")
        bias[: lengths[0] + lengths[1], start : start + n] = math.log(c.strength) if c.strength else float("-inf")
        bias[start : start + n, start : start + n] = 0
        start += n
    streams = list(parts)
    for i in range(p.depth):
        streams = double(w, i, streams, vec, still, ids, bias, count, axes, p.theta, conditions)
    for i in range(p.depth_single_blocks):
        streams = single(w, i, streams, vec, still, ids, bias, count, axes, p.theta, conditions)
    shift, scale = linear(w, "final_layer.adaLN_modulation.1", F.silu(vec))[:, None].chunk(2, -1)
    out = linear(w, "final_layer.linear", norm(streams[1]) * (1 + scale) + shift)
    b, _, h, wd = x.shape
    return F.fold(out.transpose(1, 2), (h + h % 2, wd + wd % 2), 2, stride=2)[:, :, :h, :wd]


def double(w, i, streams, vec, still, ids, bias, count, axes, theta, conditions):
    name, qs, ks, vs, mods = f"double_blocks.{i}", [], [], [], []
    for j, stream in enumerate(streams):
        kind, c = ("txt" if j == 0 else "img"), (conditions[j - 2] if j > 1 else None)
        mod = modulation(w, f"{name}.{kind}_mod", still if c else vec, 6)
        h = norm(stream) * (1 + mod[1]) + mod[0]
        qkv = linear(w, f"{name}.{kind}_attn.qkv", h)
        if c:
            qkv = qkv + torch.cat([c.delta("transformer_blocks", i, part, h) for part in "qkv"], -1)
        q, k, v = heads(qkv, count)
        qs.append(rms(w, f"{name}.{kind}_attn.norm.query_norm", q))
        ks.append(rms(w, f"{name}.{kind}_attn.norm.key_norm", k))
        vs.append(v)
        mods.append(mod)
    q, k = (rotated(torch.cat(x, 2), ids, axes, theta) for x in (qs, ks))
    seen = attend(q, k, torch.cat(vs, 2), bias).split([s.shape[1] for s in streams], 1)
    out = []
    for j, (stream, a, mod) in enumerate(zip(streams, seen, mods, strict=True)):
        kind, c = ("txt" if j == 0 else "img"), (conditions[j - 2] if j > 1 else None)
        y = linear(w, f"{name}.{kind}_attn.proj", a)
        if c:
            y = y + c.delta("transformer_blocks", i, "proj", y)
        stream = stream + mod[2] * y
        h = norm(stream) * (1 + mod[4]) + mod[3]
        mlp = linear(w, f"{name}.{kind}_mlp.2", F.gelu(linear(w, f"{name}.{kind}_mlp.0", h), approximate="tanh"))
        out.append(stream + mod[5] * mlp)
    return out


def single(w, i, streams, vec, still, ids, bias, count, axes, theta, conditions):
    name, qs, ks, vs, rest = f"single_blocks.{i}", [], [], [], []
    for j, stream in enumerate(streams):
        c = conditions[j - 2] if j > 1 else None
        mod = modulation(w, f"{name}.modulation", still if c else vec, 3)
        h = norm(stream) * (1 + mod[1]) + mod[0]
        qkv, mlp = linear(w, f"{name}.linear1", h).split([3 * h.shape[-1], 4 * h.shape[-1]], -1)
        if c:
            qkv = qkv + torch.cat([c.delta("single_transformer_blocks", i, part, h) for part in "qkv"], -1)
        q, k, v = heads(qkv, count)
        qs.append(rms(w, f"{name}.norm.query_norm", q))
        ks.append(rms(w, f"{name}.norm.key_norm", k))
        vs.append(v)
        rest.append((mod[2], F.gelu(mlp, approximate="tanh")))
    q, k = (rotated(torch.cat(x, 2), ids, axes, theta) for x in (qs, ks))
    seen = attend(q, k, torch.cat(vs, 2), bias).split([s.shape[1] for s in streams], 1)
    pairs = zip(streams, seen, rest, strict=True)
    return [s + gate * linear(w, f"{name}.linear2", torch.cat([a, mlp], -1)) for s, a, (gate, mlp) in pairs]


def loras(double, single, width, rank, seed, size=0.05):
    """A file's tensors, random."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for path, blocks, parts in (
        ("transformer_blocks", double, ("q", "k", "v", "proj")),
        ("single_transformer_blocks", single, ("q", "k", "v")),
    ):
        for i in range(blocks):
            for part in parts:
                name = f"{path}.{i}.attn.processor.{part}_loras.0"
                out[f"{name}.down.weight"] = torch.randn(rank, width, generator=generator) * size
                out[f"{name}.up.weight"] = torch.randn(width, rank, generator=generator) * size
    return out
