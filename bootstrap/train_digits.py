"""Trains the two small models that the repository carries, from scikit-learn's handwritten digits, in ComfyUI's own
Flux and Wan classes: `python bootstrap/train_digits.py image|video --steps N [--minutes M] [--threads K] [--compile]`.

Flow matching on what the stock loader will see (pixels in -1..1 after the latent format), AdamW, cosine schedule over
`--steps`, exponential average of the weights, saved as bf16 into models/."""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from pack import ROOT, load_pack, use_comfyui

use_comfyui()
load_pack()

from comfy.cli_args import args as host_args

host_args.use_pytorch_cross_attention = True  # the CPU default measures free memory in every call

import comfy.model_management
import comfy.ops
import safetensors.torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.wan.model import WanModel
from digits_data import VELOCITY, clips, images, real_digits
from torch.nn.functional import pixel_unshuffle

from tessera.methods.digits import words
from tessera.methods.digits.codec import CHANNELS

BATCH, PEAK_RATE, DROP_PROMPT = 32, 1.5e-3, 0.1
FLUX = dict(
    in_channels=CHANNELS, out_channels=CHANNELS, vec_in_dim=words.WIDTH, context_in_dim=words.WIDTH, hidden_size=256,
    mlp_ratio=4.0, num_heads=2, depth=1, depth_single_blocks=3, axes_dim=[16, 56, 56], theta=10000, patch_size=2,
    qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
)  # fmt: skip
WAN = dict(model_type="t2v", dim=256, ffn_dim=512, num_heads=4, num_layers=4, text_dim=words.WIDTH)
METADATA = {"transformer": {"num_heads": WAN["num_heads"], "text_dim": WAN["text_dim"]}}


def to_model_space(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [B, (T,) H, W] in 0..1 -> what the transformer sees, [B, 16, (T,) H/4, W/4] in -1..1."""
    latent = pixel_unshuffle((pixels * 2 - 1)[..., None, :, :], 4)
    return latent.movedim(1, 2) if latent.ndim == 5 else latent


class ImageTask:
    """Digit -> 128x128 image: 256 image tokens. A digit is 8x8 facts on 96x96 pixels, so its shape is decided at high
    noise: training is shifted further than the loader's exp(1.15). Any guidance value draws alike; CFG guides."""

    file, metadata, shift = "digits_flux.safetensors", None, 8.0

    def build(self):
        return Flux(**FLUX, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)

    def prompts(self, labels, generator):
        return [[1 + int(y), 0, 0, 0] for y in labels], None

    def pixels(self, digits, directions, generator):
        return images(digits, generator)

    def predict(self, model, x, sigma, tokens, pooled):
        guidance = torch.rand(len(x)) * 9 + 1
        return model(x, sigma[:, 0], tokens, pooled, guidance, transformer_options={})


class VideoTask:
    """Digit and direction -> 8 frames of 32x32: 128 tokens. Training follows the loader's shift of 8: which way the
    digit moves is decided at high noise."""

    file, metadata, shift = "moving_digits_wan.safetensors", {"config": json.dumps(METADATA)}, 8.0

    def build(self):
        return WanModel(**WAN, dtype=torch.float32, operations=comfy.ops.disable_weight_init)

    def prompts(self, labels, generator):
        names = list(VELOCITY)
        picks = torch.randint(0, len(names), (len(labels),), generator=generator).tolist()
        rows = [words.parse(f"{words.DIGITS[int(y)]} moving {names[d]}") for y, d in zip(labels, picks, strict=True)]
        return rows, [names[d] for d in picks]

    def pixels(self, digits, directions, generator):
        return clips(digits, directions, generator)

    def predict(self, model, x, sigma, tokens, pooled):
        return model(x, sigma * 1000, tokens, transformer_options={})


class OutOfPlace(torch.overrides.TorchFunctionMode):
    """`img += x` becomes `img = img + x`: the stock Flux class overwrites what its own backward pass needs."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (torch.Tensor.add if func is torch.Tensor.add_ else func)(*args, **(kwargs or {}))


def initialise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Xavier matrices, unit norms, small modulation tables, and a zero output layer, so that training starts calm."""
    for name, p in model.named_parameters():
        if "norm" in name and p.ndim == 1:
            torch.nn.init.zeros_(p) if name.endswith("bias") else torch.nn.init.ones_(p)
        elif name.endswith("modulation"):
            torch.nn.init.normal_(p, std=0.02, generator=generator)
        elif p.ndim >= 2:
            torch.nn.init.xavier_uniform_(p.view(p.shape[0], -1), generator=generator)
        else:
            torch.nn.init.zeros_(p)
    for name, p in model.named_parameters():
        if name in ("final_layer.linear.weight", "head.head.weight"):
            torch.nn.init.zeros_(p)
        elif ".lin.weight" in name or "adaLN_modulation" in name:
            p.data.mul_(0.2)


def noise_levels(task, batch: int, frames: int | None, generator: torch.Generator) -> torch.Tensor:
    """[B, 1], or [B, T] for video: a quarter of the clips get a clean prefix of frames (sigma 0), to learn to continue.

    Every other prefix is a single frame: it shows the digit, but only the prompt says where it goes."""
    u = torch.sigmoid(torch.randn(batch, 1, generator=generator))
    sigma = task.shift * u / (1 + (task.shift - 1) * u)
    if frames is None:
        return sigma
    sigma = sigma.expand(batch, frames).clone()
    for row in range(batch // 4):
        sigma[row, : 1 if row % 2 else int(torch.randint(1, frames, (1,), generator=generator))] = 0
    return sigma


def batch_loss(task, model, real, generator):
    digits, labels = real
    pick = torch.randint(0, len(digits), (BATCH,), generator=generator)
    rows, directions = task.prompts(labels[pick], generator)
    rows = torch.tensor(rows)
    rows[torch.rand(BATCH, generator=generator) < DROP_PROMPT] = 0
    tokens, pooled = words.encode(rows)
    clean = to_model_space(task.pixels(digits[pick], directions, generator))
    sigma = noise_levels(task, BATCH, clean.shape[2] if clean.ndim == 5 else None, generator)
    spread = sigma[:, None, :, None, None] if clean.ndim == 5 else sigma[:, :, None, None]
    noise = torch.randn(clean.shape, generator=generator)
    noisy = (1 - spread) * clean + spread * noise
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = task.predict(model, noisy, sigma, tokens, pooled)
    weight = (spread > 0).float().expand_as(clean)
    return ((velocity.float() - (noise - clean)).square() * weight).sum() / weight.sum()


def save(task, average: dict[str, torch.Tensor], out: Path, steps: int) -> None:
    tensors = {k: v.to(torch.bfloat16).contiguous() for k, v in average.items()}
    metadata = dict(task.metadata or {}) | {"training_steps": str(steps), "licence": "Apache-2.0"}
    part = out.with_suffix(".part")
    safetensors.torch.save_file(tensors, part, metadata=metadata)
    part.replace(out)


def train(task, steps: int, minutes: float, seed: int, compiled: bool, out: Path) -> None:
    generator = torch.Generator().manual_seed(seed)
    comfy.model_management.in_training = True
    model, real = task.build().train(), real_digits()
    initialise(model, generator)
    if compiled:
        model.forward_orig = torch.compile(model.forward_orig)
    params = [p for p in model.parameters() if p.requires_grad]
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(params, lr=PEAK_RATE, weight_decay=0.01, betas=(0.9, 0.99))
    print(f"{sum(p.numel() for p in params) / 1e6:.2f} M parameters, {steps} steps of {BATCH}", flush=True)
    start, total = time.time(), 0.0
    for step in range(steps):
        done = max(step / steps, (time.time() - start) / (60 * minutes))
        if done >= 1:
            break
        rate = PEAK_RATE * min(1, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with OutOfPlace():
            loss = batch_loss(task, model, real, generator)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        keep = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_([average[k] for k in average], list(model.state_dict().values()), 1 - keep)
        total += loss.item()
        if step % 100 == 99:
            print(f"step {step + 1}  {time.time() - start:.0f} s  loss {total / 100:.4f}  rate {rate:.2e}", flush=True)
            total = 0.0
        if step % 500 == 499:
            save(task, average, out, step + 1)
    save(task, average, out, step + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["image", "video"])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop the schedule by this time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="twice as fast, needs a C++ compiler")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    task = {"image": ImageTask, "video": VideoTask}[args.model]()
    train(task, args.steps, args.minutes, args.seed, args.compile, args.out or ROOT / "models" / task.file)


if __name__ == "__main__":
    main()
