"""Tiny random transformers of diffusers, saved as their releases are, and diffusers' own denoising with them."""

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import comfy.sample
import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed

TEXT, POOLED, TOKENS = 24, 20, 6
POSITIVE, NEGATIVE = 3, 5  # seeds of prompts; of classes the positive one, and no class
FLOW, EPS, V = "flow", "eps", "v"
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
ADALN = {"norm_type": "ada_norm_single", "num_embeds_ada_norm": 1000, "norm_elementwise_affine": False}


@dataclass(frozen=True)
class Tiny:
    """One class: its config, a latent of it without the batch, and what its CONDITIONING has."""

    config: dict[str, Any]
    latent: tuple[int, ...]
    kind: str
    has: tuple[str, ...] = ("cross_attn",)
    extra: dict[str, Any] = field(default_factory=dict)


TINY = {
    "DiTTransformer2DModel": Tiny(
        {**HEADS, "in_channels": 4, "out_channels": 8, "sample_size": 8, "num_embeds_ada_norm": 1000}, (4, 8, 8), EPS, ()
    ),
    "PixArtTransformer2DModel": Tiny(
        {**HEADS, "num_attention_heads": 3, "in_channels": 4, "out_channels": 8, "sample_size": 128, "cross_attention_dim": 48,
         "caption_channels": TEXT, **ADALN, "use_additional_conditions": True}, (4, 8, 12), EPS, ("cross_attn", "attention_mask")
    ),
    "SanaTransformer2DModel": Tiny(
        {**HEADS, "in_channels": 32, "out_channels": 32, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16,
         "cross_attention_dim": 32, "caption_channels": TEXT, "sample_size": 8, "timestep_scale": 1.0},
        (32, 6, 4), FLOW, ("cross_attn", "attention_mask"),
    ),
    "SanaVideoTransformer3DModel": Tiny(
        {**HEADS, "in_channels": 16, "out_channels": 16, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16,
         "cross_attention_dim": 32, "caption_channels": TEXT, "sample_size": 8},
        (16, 3, 4, 6), FLOW, ("cross_attn", "attention_mask"),
    ),
    "CogVideoXTransformer3DModel": Tiny(
        {**HEADS, "in_channels": 16, "out_channels": 16, "time_embed_dim": 8, "text_embed_dim": TEXT, "sample_width": 8,
         "sample_height": 8, "sample_frames": 9, "max_text_seq_length": TOKENS, "use_rotary_positional_embeddings": True},
        (16, 3, 4, 6), V,
    ),
    "LatteTransformer3DModel": Tiny(
        {**HEADS, "in_channels": 4, "out_channels": 8, "sample_size": 8, "patch_size": 2, "cross_attention_dim": 32,
         "caption_channels": TEXT, **ADALN, "activation_fn": "gelu-approximate", "attention_bias": True,
         "video_length": 3}, (4, 3, 8, 4), EPS,
    ),
    "LTXVideoTransformer3DModel": Tiny(
        {**HEADS, "in_channels": 128, "out_channels": 128, "cross_attention_dim": 32, "caption_channels": TEXT},
        (128, 3, 4, 6), FLOW, ("cross_attn", "attention_mask"), {"frame_rate": 30.0},
    ),
    "FluxTransformer2DModel": Tiny(
        {**HEADS, "in_channels": 64, "num_single_layers": 2, "joint_attention_dim": TEXT, "pooled_projection_dim": POOLED,
         "guidance_embeds": True, "axes_dims_rope": (4, 6, 6)},
        (16, 8, 12), FLOW, ("cross_attn", "pooled_output"), {"guidance": 2.5},
    ),
    "SD3Transformer2DModel": Tiny(
        {**HEADS, "in_channels": 16, "out_channels": 16, "sample_size": 16, "joint_attention_dim": TEXT,
         "caption_projection_dim": 32, "pooled_projection_dim": POOLED, "pos_embed_max_size": 16, "qk_norm": "rms_norm",
         "dual_attention_layers": (0,)}, (16, 8, 12), FLOW, ("cross_attn", "pooled_output"),
    ),
    "WanTransformer3DModel": Tiny(
        {**HEADS, "in_channels": 16, "out_channels": 16, "text_dim": TEXT, "freq_dim": 32, "ffn_dim": 48,
         "rope_max_seq_len": 32}, (16, 3, 4, 6), FLOW,
    ),
}  # fmt: skip
VARIANTS = {  # what other configs of these classes change: "class:variant"
    "CogVideoXTransformer3DModel:2b": {"use_rotary_positional_embeddings": False},
    "CogVideoXTransformer3DModel:1.5": {"patch_size_t": 2, "sample_frames": 13, "patch_bias": False},
    "FluxTransformer2DModel:schnell": {"guidance_embeds": False},
    "PixArtTransformer2DModel:sigma": {"use_additional_conditions": False, "interpolation_scale": 2},
    "SanaTransformer2DModel:4k": {"interpolation_scale": 2, "qk_norm": "rms_norm_across_heads", "timestep_scale": 0.5},
    "SD3Transformer2DModel:3.0": {"dual_attention_layers": (), "qk_norm": None},
    "WanTransformer3DModel:2.2": {"in_channels": 48, "out_channels": 48},
}
TINY |= {
    name: replace(
        TINY[name.split(":")[0]],
        config={**TINY[name.split(":")[0]].config, **changes},
        latent=(48, 3, 4, 6) if "2.2" in name else (16, 4, 4, 6) if "1.5" in name else TINY[name.split(":")[0]].latent,
    )
    for name, changes in VARIANTS.items()
}
CLASSES = [name for name in TINY if name not in VARIANTS]
SIGMAS = [1.0, 0.8, 0.5, 0.2]  # of flows; 0 follows


@functools.cache
def plain(name: str) -> Any:
    """The class with weights that keep activations near unit size, in fp32; matrices N(0, 1 / fan-in)."""
    model = getattr(diffusers, name.split(":")[0])(**TINY[name].config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(len(name))
    for key, value in model.state_dict().items():
        if key.endswith("pos_embed") or "pos_embed." in key:
            continue
        spread = 1 / max(1, value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1
        offset = 1.0 if value.ndim == 1 and key.endswith("weight") else 0.0
        value.copy_(torch.randn(value.shape, generator=generator) * spread + offset)
    return model


def save(name: str, root: Path, **how: Any) -> Path:
    """A folder below `root` as a release has it, the model in `transformer`."""
    folder = root / name.replace(":", "_") / "transformer"
    plain(name).save_pretrained(folder, **how)
    return folder


def conditions(name: str, batch: int = 1, seed: int = POSITIVE) -> dict[str, torch.Tensor]:
    """What the prompt of this class gives, by key of CONDITIONING."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        "cross_attn": torch.randn(1, TOKENS, TEXT, generator=generator).repeat(batch, 1, 1),
        "pooled_output": torch.randn(1, POOLED, generator=generator).repeat(batch, 1),
        "attention_mask": (torch.arange(TOKENS) < TOKENS - 2).float().expand(batch, -1),
    }
    made = {key: made[key] for key in TINY[name].has}
    if not TINY[name].has:
        made["class_label"] = torch.full((batch,), seed if seed == POSITIVE else 1000)
    return made


def conditioning(name: str, seed: int = POSITIVE) -> list:
    """The same as a CONDITIONING."""
    made = conditions(name, seed=seed)
    if "class_label" in made:
        return [[torch.zeros(1, 1, 1), {"class_label": seed if seed == POSITIVE else -1}]]
    return [[made.pop("cross_attn"), {**made, **TINY[name].extra}]]


def noise(name: str, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, *TINY[name].latent, generator=torch.Generator().manual_seed(11))


def scheduler(name: str, steps: int = 4) -> Any:
    """diffusers' own, deterministic."""
    kind = TINY[name].kind
    if kind == FLOW:
        made = diffusers.FlowMatchEulerDiscreteScheduler()
        made.set_timesteps(sigmas=SIGMAS)
    elif kind == V:
        made = diffusers.CogVideoXDDIMScheduler(
            snr_shift_scale=3.0 if "2b" in name else 1.0,
            rescale_betas_zero_snr=True,
            prediction_type="v_prediction",
            timestep_spacing="trailing",
        )
        made.set_timesteps(steps)
    else:
        made = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
        made.set_timesteps(steps)
    return made


def predict(name: str, x: torch.Tensor, t: torch.Tensor, c: dict[str, torch.Tensor]) -> torch.Tensor:
    """The class called as its pipeline calls it: x [B, C, (T,) H, W] -> prediction of that shape."""
    model, batch = plain(name), x.shape[0]
    common = {"timestep": t.expand(batch), "return_dict": False}
    if name.startswith("DiT"):
        return model(x, class_labels=c["class_label"], **common)[0][:, :4]
    common["encoder_hidden_states"] = c["cross_attn"]
    if "pooled_output" in c:
        common["pooled_projections"] = c["pooled_output"]
    if "attention_mask" in c:
        common["encoder_attention_mask"] = c["attention_mask"]
    if name.startswith("PixArt"):
        sides = torch.tensor([x.shape[-2] * 8.0, x.shape[-1] * 8.0]).repeat(batch, 1)
        added = {"resolution": sides, "aspect_ratio": sides[:, :1] / sides[:, 1:]}
        return model(x, added_cond_kwargs=added, **common)[0].chunk(2, 1)[0]
    if name.startswith("Latte"):
        return model(x, **common)[0].chunk(2, 1)[0]
    if name.startswith("CogVideoX"):
        frames, h, w = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
        if "2b" in name:
            return model(x.permute(0, 2, 1, 3, 4), **common)[0].permute(0, 2, 1, 3, 4)
        if "1.5" in name:
            rope = get_3d_rotary_pos_embed(16, None, (h, w), frames // 2, grid_type="slice", max_size=(4, 4))
            return model(x.permute(0, 2, 1, 3, 4), image_rotary_emb=rope, **common)[0].permute(0, 2, 1, 3, 4)
        # the trained grid is 4 x 4: a wider picture is fitted to its width and centred, so rows keep their distances
        high = round(4 / w * h)
        top = round((4 - high) / 2)
        rope = get_3d_rotary_pos_embed(16, ((top, 0), (top + high, 4)), (h, w), frames)
        return model(x.permute(0, 2, 1, 3, 4), image_rotary_emb=rope, **common)[0].permute(0, 2, 1, 3, 4)
    if name.startswith("LTX"):
        frames, h, w = x.shape[2:]
        scale = (8 / 30.0, 32, 32)
        tokens = x.permute(0, 2, 3, 4, 1).reshape(batch, frames * h * w, -1)
        out = model(tokens, num_frames=frames, height=h, width=w, rope_interpolation_scale=scale, **common)[0]
        return out.reshape(batch, frames, h, w, -1).permute(0, 4, 1, 2, 3)
    if name.startswith("Flux"):
        pipeline = diffusers.FluxPipeline
        h, w = x.shape[-2:]
        ids = pipeline._prepare_latent_image_ids(batch, h // 2, w // 2, "cpu", torch.float32)
        common["timestep"] = common["timestep"] / 1000
        out = model(
            pipeline._pack_latents(x, batch, 16, h, w), img_ids=ids, txt_ids=torch.zeros(TOKENS, 3),
            guidance=None if "schnell" in name else torch.full((batch,), 2.5), **common,
        )[0]  # fmt: skip
        return pipeline._unpack_latents(out, h * 8, w * 8, 8)
    if name.startswith("Wan"):
        common["encoder_hidden_states"] = torch.nn.functional.pad(c["cross_attn"], (0, 0, 0, 512 - TOKENS))
    common["timestep"] = common["timestep"] * getattr(model.config, "timestep_scale", 1.0)
    return model(x, **common)[0]


def reference(name: str, cfg: float = 1.0, batch: int = 1, start: torch.Tensor | None = None) -> torch.Tensor:
    """The denoised latent in the model's space: the scheduler's loop around the class, with guidance as pipelines do."""
    x, steps = noise(name, batch) if start is None else start, scheduler(name)
    positive, negative = conditions(name, batch), conditions(name, batch, seed=NEGATIVE)
    with torch.no_grad():
        for t in steps.timesteps:
            made = predict(name, x, t, positive)
            if cfg != 1.0:
                other = predict(name, x, t, negative)
                made = other + cfg * (made - other)
            x = steps.step(made, t, x, return_dict=False)[0]
    return x


def sigmas(name: str, model: Any) -> torch.Tensor:
    """The scheduler's noise levels as ComfyUI counts them."""
    if TINY[name].kind == FLOW:
        return torch.tensor([*SIGMAS, 0.0])
    levels = model.get_model_object("model_sampling").sigmas
    return torch.cat((levels[scheduler(name).timesteps.long()], torch.zeros(1)))


def sampled(model: Any, name: str, cfg: float = 1.0, batch: int = 1, **more: Any) -> torch.Tensor:
    """The same by ComfyUI's sampler, in the model's space."""
    start, levels = more.pop("start", None), more.pop("levels", None)
    start = noise(name, batch) if start is None else start
    levels = sigmas(name, model) if levels is None else levels
    out = comfy.sample.sample(
        model, start, len(levels) - 1, cfg, "euler", "simple", conditioning(name), conditioning(name, seed=NEGATIVE),
        torch.zeros_like(start), sigmas=levels, disable_pbar=True, seed=1, **more,
    )  # fmt: skip
    return model.model.process_latent_in(out)
