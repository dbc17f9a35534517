"""A tiny DiT4SR in the released file's layout, its MODEL through ComfyUI's own converter, and the authors' forward written
out in plain torch on diffusers' names, without the pack (Port)."""

import functools
import json
import math
from dataclasses import replace
from pathlib import Path

import comfy.sd
import torch
from nodes_helper import Job, _outputs, conds, run_node
from tiny_specs import SPECS
from torch.nn.functional import conv2d, gelu, layer_norm, linear, scaled_dot_product_attention, silu

from tessera.methods.control.dit4sr import Dit4sr, Sizes
from tessera.nodes.control.apply_dit4sr import ApplyDit4sr
from tessera.patching.dit4sr import Adapter, enlarged

NAME = "Apply DiT4SR"
SIGMAS = [1.0, 0.6, 0.3, 0.0]
GOLDEN = json.loads((Path(__file__).parent / "golden/keys/dit4sr.json").read_text())
WIDTH, BLOCKS, DUAL, PLACES = 192, 3, (0, 1), 16  # PLACES: side of the table of positions
SPEC = replace(SPECS["sd3"], latent=(1, 16, 8, 12), context=(1, 10, 96), pooled=(1, 64))


def control_shapes(blocks=BLOCKS, dual=DUAL, width=WIDTH):
    groups = [("control", range(blocks)), ("control_dual", dual)]
    found = {k.format(i=i): shape for group, places in groups for i in places for k, shape in GOLDEN[group].items()}
    return {k: [width * (n // 1536) if n >= 1536 else n for n in shape] for k, shape in found.items()}


@functools.cache
def base_shapes():
    """Of diffusers' own class."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        model = SD3Transformer2DModel(
            sample_size=PLACES, patch_size=2, in_channels=16, num_layers=BLOCKS, attention_head_dim=64,
            num_attention_heads=WIDTH // 64, joint_attention_dim=96, caption_projection_dim=WIDTH, pooled_projection_dim=64,
            out_channels=16, pos_embed_max_size=PLACES, dual_attention_layers=DUAL, qk_norm="rms_norm",
        )  # fmt: skip
    return {key: [*value.shape] for key, value in model.state_dict().items()}


def idle_shapes():
    keys = {k.format(i=i): shape for i in DUAL for k, shape in GOLDEN["idle_dual"].items()}
    return {k: [WIDTH if n == 1536 else n for n in shape] for k, shape in keys.items()}


def made(shapes, seed=0):
    """Matrices that keep sizes, norms near 1, biases that are seen."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        out[key] = noise / math.prod(shape[1:]) ** 0.5 if len(shape) > 1 else 0.2 * noise + (".norm" in key)
    return out


@functools.cache
def _made(kind):
    return made({"control": control_shapes, "base": base_shapes}[kind](), seed=len(kind))


def control():
    return {key: tensor.clone() for key, tensor in _made("control").items()}


def base():
    return {key: tensor.clone() for key, tensor in _made("base").items()}


def model_of_base(tensors, dtype="fp32"):
    """The MODEL that ComfyUI makes of diffusers' tensors."""
    model = comfy.sd.load_diffusion_model_state_dict({k: v.clone() for k, v in tensors.items()})
    if dtype == "bf16":
        model.set_model_compute_dtype(torch.bfloat16)
    _outputs.append(model)
    return model


class Vae:
    """8 x 8 pixels to one place of 16 channels, by a fixed matrix."""

    def encode(self, image):
        blocks = torch.nn.functional.avg_pool2d(image.movedim(-1, 1).float(), 8)
        mix = torch.randn(16, 3, generator=torch.Generator().manual_seed(5))
        return torch.einsum("oc,bchw->bohw", mix, blocks)


class Port:
    """model_dit4sr and model_dit4sr_r1 of the authors. legacy: the former."""

    def __init__(self, weights, legacy=False, scale=1.2, weight=1.0):
        self.w, self.legacy, self.scale, self.weight = weights, legacy, scale, weight

    def lin(self, name, x):
        return linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def rms(self, name, x):
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.w[f"{name}.weight"]

    def embed(self, x):
        """x [b, 16, H, W] -> tokens with places."""
        tokens = conv2d(x, self.w["pos_embed.proj.weight"], self.w["pos_embed.proj.bias"], stride=2)
        h, w = tokens.shape[-2:]
        top, left = (PLACES - h) // 2, (PLACES - w) // 2
        table = self.w["pos_embed.pos_embed"].view(PLACES, PLACES, -1)[top : top + h, left : left + w]
        return tokens.flatten(2).transpose(1, 2) + table.reshape(1, h * w, -1)

    def attention(self, path, both, text):
        """both [b, 2 N, D], text [b, L, D] or None -> outputs of the same shapes."""
        x, r = both.chunk(2, 1)
        heads = lambda t: t.unflatten(2, (-1, 64)).transpose(1, 2)  # noqa: E731
        q, k, v = (heads(self.lin(f"{path}.to_{n}", x)) for n in "qkv")
        qr, kr, vr = (heads(self.lin(f"{path}.to_{n}_control", self.lin(f"{path}.to_{n}", r))) for n in "qkv")
        q, qr, k = self.rms(f"{path}.norm_q", q), self.rms(f"{path}.norm_q", qr), self.rms(f"{path}.norm_k", k)
        kr = self.rms(f"{path}.norm_k", k if self.legacy else kr)
        parts = [(q, k, v), (qr, kr, vr)]
        if text is not None:
            qt, kt, vt = (heads(self.lin(f"{path}.add_{n}_proj", text)) for n in "qkv")
            parts.append((self.rms(f"{path}.norm_added_q", qt), self.rms(f"{path}.norm_added_k", kt), vt))
        q, k, v = (torch.cat(part, 2) for part in zip(*parts, strict=True))
        n = x.shape[1]
        bias = torch.zeros(k.shape[2])
        bias[n : 2 * n] = math.log(self.weight)
        out = scaled_dot_product_attention(q, k, v, bias.expand(q.shape[2], -1)).transpose(1, 2).flatten(2)
        own, theirs = (
            self.lin(f"{path}.to_out.0", out[:, :n]),
            self.lin(f"{path}.to_out_control", out[:, n : 2 * n] + r),
        )
        return torch.cat((own, theirs), 1), out[:, 2 * n :]

    def mlp(self, path, x, grid):
        x = gelu(self.lin(f"{path}.ff.net.0.proj", x), approximate="tanh")
        own, r = x.chunk(2, 1)
        picture = r.transpose(1, 2).unflatten(2, grid)
        weight, bias = (self.w[f"{path}.ff.control_conv.{end}"] for end in ("weight", "bias"))
        mixed = conv2d(picture, weight, bias, padding=1, groups=len(weight)).flatten(2).transpose(1, 2)
        return self.lin(f"{path}.ff.net.2", torch.cat((own + self.scale * self.weight * mixed, r), 1))

    def block(self, i, both, text, temb, grid):
        path, last = f"transformer_blocks.{i}", i == BLOCKS - 1
        norm = lambda t: layer_norm(t, t.shape[-1:], eps=1e-6)  # noqa: E731
        under = lambda t, shift, scale: norm(t) * (1 + scale[:, None]) + shift[:, None]  # noqa: E731
        mods = self.lin(f"{path}.norm1.linear", silu(temb)).chunk(9 if i in DUAL else 6, 1)
        told = self.lin(f"{path}.norm1_context.linear", silu(temb)).chunk(2 if last else 6, 1)
        normed = under(text, told[1], told[0]) if last else under(text, told[0], told[1])
        a, t = self.attention(f"{path}.attn", under(both, mods[0], mods[1]), normed)
        x = both + mods[2][:, None] * a
        if i in DUAL:
            x = x + mods[8][:, None] * self.attention(f"{path}.attn2", under(both, mods[6], mods[7]), None)[0]
        x = x + mods[5][:, None] * self.mlp(path, under(x, mods[3], mods[4]), grid)
        if last:
            return x, None
        text = text + told[2][:, None] * self.lin(f"{path}.attn.to_add_out", t)
        hidden = gelu(self.lin(f"{path}.ff_context.net.0.proj", under(text, told[3], told[4])), approximate="tanh")
        return x, text + told[5][:, None] * self.lin(f"{path}.ff_context.net.2", hidden)

    def __call__(self, x, low, sigma, context, pooled):
        """x, low [b, 16, H, W] -> v of the same shape."""
        rates = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        angles = 1000 * sigma * rates[None]
        time = torch.cat((angles.cos(), angles.sin()), 1)
        for name, value in (("timestep", time), ("text", pooled)):
            at = f"time_text_embed.{name}_embedder"
            made_ = self.lin(f"{at}.linear_2", silu(self.lin(f"{at}.linear_1", value)))
            temb = made_ if name == "timestep" else temb + made_  # noqa: F821
        both, text = torch.cat((self.embed(x), self.embed(low)), 1), self.lin("context_embedder", context)
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        for i in range(BLOCKS):
            both, text = self.block(i, both, text, temb, (h, w))
        scale, shift = self.lin("norm_out.linear", silu(temb)).chunk(2, 1)
        out = both[:, : h * w]
        out = layer_norm(out, out.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        out = self.lin("proj_out", out).unflatten(1, (h, w)).unflatten(3, (2, 2, 16))
        return torch.einsum("bhwpqc->bchpwq", out).flatten(4, 5).flatten(2, 3)

    def sample(self, noise, low, sigmas, prompts, cfg):
        """Euler from noise, in latent space as a VAE takes it. prompts: (context, pooled) of positive and negative."""
        x = noise * sigmas[0]
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            v, u = (self(x, low, sigma, c.expand(len(x), -1, -1), p.expand(len(x), -1)) for c, p in prompts)
            x = x + (following - sigma) * (u + cfg * (v - u))
        return x / 1.5305 + 0.0609


BASE, CONTROL = base(), control()


def tiny_adapter():
    """What Load DiT4SR gives for it."""
    return Adapter.of(Dit4sr("tiny", Sizes(BLOCKS, frozenset(DUAL), WIDTH), "r1", control()))


def picture(height=16, width=24, batch=1):
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(3))


def applied(model, adapter, image=None, **inputs):
    """(MODEL, LATENT's samples)."""
    image = picture() if image is None else image
    out = run_node(ApplyDit4sr, model=model, adapter=adapter, image=image, vae=Vae(), **inputs)
    return out[0], out[1]["samples"]


def job(latent=None, **settings):
    return Job(SPEC, sigmas=torch.tensor(SIGMAS), latent=latent, **settings)


def wanted(port, image, latent, cfg=3.0, upscale=4.0):
    """What the authors' forward samples for the same noise and prompts."""
    noise = torch.randn(latent.shape, generator=torch.manual_seed(7))
    low = (Vae().encode(enlarged(image, upscale, 8)) - 0.0609) * 1.5305
    prompts = [(c, extra["pooled_output"]) for ((c, extra),) in conds(SPEC)]
    return port.sample(noise, low, SIGMAS, prompts, cfg)
