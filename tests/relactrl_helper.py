"""A small PixArt-alpha, control weights in the layout of RelaCtrl's release, and the official forward of both together in
plain torch, written from its description: one row and one head after another where that is plainer."""

import functools
import json
import math
from pathlib import Path

import torch
from nodes_helper import Job, _outputs, run_node
from tiny_models import build_direct
from tiny_specs import Spec
from torch.nn.functional import conv2d, gelu, layer_norm, linear, silu

from tessera.methods.control.relactrl_keys import read
from tessera.nodes.control.apply_relactrl import ApplyRelactrl

GOLDEN = json.loads((Path(__file__).parent / "golden/keys/relactrl.json").read_text())
WIDTH, HEADS, DEPTH = 96, 4, 22
SPEC = Spec(
    "pixart.pixartms:PixArtMS",
    {"num_heads": HEADS, "patch_size": 2, "hidden_size": WIDTH, "in_channels": 4, "depth": DEPTH, "model_max_length": 16,
     "micro_condition": True, "caption_channels": 32, "image_model": "pixart_alpha"},
    latent=(1, 4, 32, 40), context=(1, 10, 32), direct="PixArtAlpha",
)  # fmt: skip


@functools.cache
def _built():
    return build_direct(SPEC)


def pixart(dtype: str = "fp32"):
    model = _built().clone()
    if dtype == "bf16":
        model.set_model_compute_dtype(torch.bfloat16)
    _outputs.append(model)
    return model


def shapes(width: int = GOLDEN["width"]) -> dict[str, tuple[int, ...]]:
    """Key -> shape of the release, for a PixArt of that width."""
    found = {}
    for n, count in enumerate(GOLDEN["groups"]):
        sizes = {"D": width, "d": width // count, "3d": 3 * width // count, 6: 6}
        found |= {key.format(n=n): tuple(sizes[s] for s in shape) for key, shape in GOLDEN["block"].items()}
        for g in range(count):
            found |= {key.format(n=n, g=g): tuple(sizes[s] for s in shape) for key, shape in GOLDEN["group"].items()}
    return found


def tensors(seed: int = 0, size: float = 0.5) -> dict[str, torch.Tensor]:
    """Random control weights of which every part counts."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator) * size / (shape[-1] ** 0.5 if len(shape) == 2 else 4)
        for key, shape in shapes(WIDTH).items()
    }


CONTROL = read(tensors(), "tiny.safetensors")
LATENT = torch.randn(2, 4, 32, 40, generator=torch.Generator().manual_seed(3))


def controlled(model, latent=LATENT, **inputs):
    return run_node(ApplyRelactrl, model=model, control=CONTROL, latent={"samples": latent}, **inputs)[0]


def job(steps=2, batch=1, **settings):
    return Job(SPEC, steps=steps, batch=batch, **settings)


def places(height: int, width: int) -> torch.Tensor:
    """Sines and cosines [h w, WIDTH] of row and column, as PixArt lays a latent of so many cells out."""
    middle = (height + width) // 2
    stretch, base = max(1, round(middle / 64)), round(middle / 64) * 64 // 2
    rates = 1 / 10000 ** (torch.arange(WIDTH // 4, dtype=torch.float64) / (WIDTH // 4))
    rows, columns = height // 2, width // 2
    found = []
    for i in range(rows):
        for j in range(columns):
            x, y = j * base / columns / stretch * rates, i * base / rows / stretch * rates
            found.append(torch.cat((x.sin(), x.cos(), y.sin(), y.cos())))
    return torch.stack(found).float()


def sinusoid(t: torch.Tensor) -> torch.Tensor:
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    return torch.cat((angles.cos(), angles.sin()), 1)


class Official:
    """PixArt under RelaCtrl. control None: PixArt alone. before: called with the number of each call; draws come from
    torch's own generator as it left it."""

    def __init__(self, weights, control, condition, before=lambda call: None, strength=1.0, repeat=True):
        self.w, self.control, self.condition = weights, control, condition
        self.before, self.strength, self.repeat, self.calls = before, strength, repeat, 0

    def lin(self, name, x):
        return linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def mlp(self, name, x):
        return self.lin(f"{name}.mlp.2", silu(self.lin(f"{name}.mlp.0", x)))

    def embed(self, z):
        x = conv2d(z, self.w["x_embedder.proj.weight"], self.w["x_embedder.proj.bias"], stride=2)
        return x.flatten(2).transpose(1, 2) + places(*z.shape[-2:])

    def __call__(self, x, timesteps, context, c_size=None, c_ar=None, **_):
        self.before(self.calls)
        self.calls += 1
        b, _, height, width = x.shape
        size = c_size if c_size is not None else torch.tensor([height * 8.0, width * 8.0]).repeat(b, 1)
        ratio = c_ar if c_ar is not None else torch.full((b, 1), height / width)
        third = WIDTH // 3
        parts = [self.mlp("csize_embedder", sinusoid(v)) for v in size.view(-1, 2).T]
        shape = torch.cat((*parts, self.mlp("ar_embedder", sinusoid(ratio.flatten()))), 1)
        assert shape.shape[1] == 3 * third
        t = self.mlp("t_embedder", sinusoid(timesteps)) + shape.expand(b, -1)
        t0 = self.lin("t_block.1", silu(t)).view(b, 6, WIDTH)
        text = self.lin("y_embedder.y_proj.fc2", gelu(self.lin("y_embedder.y_proj.fc1", context), approximate="tanh"))
        x, c, residual = self.embed(x), None, None
        if self.control is not None:
            c = self.embed(self.condition.repeat(b // self.condition.shape[0], 1, 1, 1))
        for i in range(DEPTH):
            fresh = i - 1 in GOLDEN["places"]
            if c is not None and fresh:
                c, residual = self.control_block(GOLDEN["places"].index(i - 1), x, c, t0)
            if residual is not None and (fresh or self.repeat):
                x = x + self.strength * residual
            x = self.block(f"blocks.{i}", x, text, t0)
        shift, scale = (self.w["final_layer.scale_shift_table"] + t[:, None]).chunk(2, 1)
        x = self.lin("final_layer.linear", layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift)
        x = x.view(b, height // 2, width // 2, 2, 2, 8).permute(0, 5, 1, 3, 2, 4).reshape(b, 8, height, width)
        return x[:, :4]

    def block(self, name, x, text, t0):
        a, b, c, d, e, f = (self.w[f"{name}.scale_shift_table"] + t0).chunk(6, 1)
        h = layer_norm(x, (WIDTH,), eps=1e-6) * (1 + b) + a
        q, k, v = self.lin(f"{name}.attn.qkv", h).chunk(3, -1)
        x = x + c * self.lin(f"{name}.attn.proj", heads(q, k, v))
        k, v = self.lin(f"{name}.cross_attn.kv_linear", text).chunk(2, -1)
        x = x + self.lin(f"{name}.cross_attn.proj", heads(self.lin(f"{name}.cross_attn.q_linear", x), k, v))
        h = layer_norm(x, (WIDTH,), eps=1e-6) * (1 + e) + d
        return x + f * self.lin(f"{name}.mlp.fc2", gelu(self.lin(f"{name}.mlp.fc1", h), approximate="tanh"))

    def control_block(self, n, x, c, t0):
        def lin(name, x):
            return linear(x, *(self.control[f"controlnet.{n}.{name}.{end}"] for end in ("weight", "bias")))

        c = lin("before_proj", c) + x if n == 0 else c + lin("before_proj", x)
        shift, scale, gate = (self.control[f"controlnet.{n}.process.scale_shift_table"] + t0)[:, :3].chunk(3, 1)
        h = layer_norm(c, (WIDTH,), eps=1e-6) * (1 + scale) + shift
        mixed, count = torch.empty_like(h), GOLDEN["groups"][n]
        for g, channels in enumerate(torch.randperm(WIDTH).chunk(count)):
            part = h[:, :, channels]
            at = torch.randperm(part[0].numel())
            segments = part.flatten(1)[:, at].chunk(4, 1)
            done = []
            for segment in segments:
                q, k, v = lin(f"process.experts_attn.{g}.attn.qkv", segment.view(len(h), -1, WIDTH // count)).chunk(
                    3, -1
                )
                done.append(lin(f"process.experts_attn.{g}.attn.proj", heads(q, k, v)).flatten(1))
            mixed[:, :, channels] = torch.cat(done, 1)[:, at.argsort()].view(part.shape)
        c = c + gate * mixed
        return c, lin("after_proj", c)


def heads(q, k, v):
    """Four heads, one after another."""
    found = []
    for a, b, c in zip(*(t.chunk(HEADS, -1) for t in (q, k, v)), strict=True):
        found.append((a @ b.transpose(1, 2) * a.shape[-1] ** -0.5).softmax(-1) @ c)
    return torch.cat(found, -1)
