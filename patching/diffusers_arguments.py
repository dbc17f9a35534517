"""What each class of diffusers is called with, from what ComfyUI hands a diffusion model, and its answer as a latent. One
function a class, as the pipelines of diffusers call it; c holds the conditions that the class's table names."""

from collections.abc import Mapping
from typing import Any

import torch

Conditions = Mapping[str, torch.Tensor]
RATE = 25.0  # frames a second where LTX-Video's CONDITIONING does not say, as core's LTXVConditioning


def dit(model, x: torch.Tensor, t: torch.Tensor, c: Conditions) -> dict[str, Any]:
    """x [B, C, H, W]; the class unpatches squares alone, others would come out scrambled."""
    if x.shape[-1] != x.shape[-2]:
        h, w = x.shape[-2:]
        raise ValueError(
            f"DiTTransformer2DModel draws squares only, and this latent is {w} x {h}. Make its sides equal."
        )
    most = model.config.num_embeds_ada_norm
    labels = c["class_label"].flatten()
    if int(labels.max()) > most:
        raise ValueError(
            f"This DiT knows the classes 0 to {most - 1}, not {int(labels.max())}. Choose one in Class Label."
        )
    return {"hidden_states": x, "timestep": t, "class_labels": torch.where(labels < 0, most, labels)}


def pixart(model, x: torch.Tensor, t: torch.Tensor, c: Conditions) -> dict[str, Any]:
    """x [B, C, H, W]. The size in pixels is a condition of the 1,024-pixel models of PixArt alpha."""
    size = c["size"]
    return {
        **crossed(model, x, t, c),
        "added_cond_kwargs": {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]},
    }


def crossed(_, x: torch.Tensor, t: torch.Tensor, c: Conditions) -> dict[str, Any]:
    """x [B, C, (T,) H, W], text in cross-attention under its mask [B, L] of ones and zeros."""
    return {
        "hidden_states": x,
        "timestep": t,
        "encoder_hidden_states": c["cross_attn"],
        "encoder_attention_mask": c.get("attention_mask"),
    }


def sana(model, x: torch.Tensor, t: torch.Tensor, c: Conditions) -> dict[str, Any]:
    """Sana and Sana Video."""
    return crossed(model, x, t * getattr(model.config, "timestep_scale", 1.0), c)


def latte(model, x: torch.Tensor, t: torch.Tensor, c: Conditions) -> dict[str, Any]:
    """x [B, C, T, H, W]; its places in time were made for one number of frames. The pipeline gives no mask."""
    frames = model.config.video_length
    if x.shape[2] not in (1, frames):
        raise ValueError(f"This Latte draws 1 or {frames} frames, and the latent has {x.shape[2]}. Set its length.")
    return {"hidden_states": x, "timestep": t, "encoder_hidden_states": c["cross_attn"]}


def cogvideox(model, x: torch.Tensor, t: torch.Tensor, c: Conditions) -> dict[str, Any]:
    """x [B, C, T, H, W]; the class has frames first. Version 1.5 joins frames; 2B has places for one length of text."""
    config, frames, length = model.config, x.shape[2], c["cross_attn"].shape[1]
    if frames % (config.patch_size_t or 1):
        raise ValueError(
            f"This CogVideoX joins {config.patch_size_t} latent frames in a token, and the latent has {frames}. Set a length that "
            f"gives {frames + 1}."
        )
    if not config.use_rotary_positional_embeddings and length != config.max_text_seq_length:
        raise ValueError(
            f"This CogVideoX takes a text of {config.max_text_seq_length} tokens, and this CONDITIONING has {length}. Encode the "
            "prompt padded to that length."
        )
    return {
        "hidden_states": x.transpose(1, 2),
        "timestep": t,
        "encoder_hidden_states": c["cross_attn"],
        "image_rotary_emb": rotations(model.config, *x.shape[2:], x.device),
    }


def rotations(config, frames: int, height: int, width: int, device) -> tuple[torch.Tensor, torch.Tensor] | None:
    """CogVideoX's table of cosines and sines [T H W, D] for a latent: the picture's grid, fitted into the trained one
    (1.0), or its own places (1.5)."""
    if not config.use_rotary_positional_embeddings:
        return None
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    p, p_t = config.patch_size, config.patch_size_t
    grid, trained = (height // p, width // p), (config.sample_height // p, config.sample_width // p)
    if p_t is None:
        places = {"crops_coords": get_resize_crop_region_for_grid(grid, trained[1], trained[0])}
    else:
        places = {"crops_coords": None, "grid_type": "slice", "max_size": trained}
    return get_3d_rotary_pos_embed(
        embed_dim=config.attention_head_dim,
        grid_size=grid,
        temporal_size=-(-frames // (p_t or 1)),
        device=device,
        **places,
    )


def ltx(model, x: torch.Tensor, t: torch.Tensor, c: Conditions) -> dict[str, Any]:
    """x [B, C, T, H, W] as tokens [B, T H W, C]; places in seconds and pixels. The autoencoder is 8 x 32 x 32."""
    frames, height, width = x.shape[2:]
    rate = float(c["frame_rate"].flatten()[0]) if "frame_rate" in c else RATE
    text = c["cross_attn"]
    mask = c.get("attention_mask")
    return {
        "hidden_states": x.flatten(2).transpose(1, 2),
        "timestep": t,
        "encoder_hidden_states": text,
        "encoder_attention_mask": torch.ones(text.shape[:2], device=x.device) if mask is None else mask,
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / rate, 32, 32),
    }


def flux(model, x: torch.Tensor, t: torch.Tensor, c: Conditions) -> dict[str, Any]:
    """x [B, 16, H, W] as tokens [B, H/2 W/2, 64] with places (0, row, column); text lies at the origin."""
    batch, channels, height, width = x.shape
    h, w = height // 2, width // 2
    tokens = x.view(batch, channels, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(batch, h * w, channels * 4)
    places = torch.zeros(h, w, 3, device=x.device, dtype=x.dtype)
    places[..., 1] += torch.arange(h, device=x.device)[:, None]
    places[..., 2] += torch.arange(w, device=x.device)[None, :]
    text = c["cross_attn"]
    return {
        "hidden_states": tokens,
        "timestep": t,
        "encoder_hidden_states": text,
        "pooled_projections": c["pooled_output"],
        "guidance": c.get("guidance"),
        "img_ids": places.view(-1, 3),
        "txt_ids": torch.zeros(text.shape[1], 3, device=x.device, dtype=x.dtype),
    }


def sd3(_, x: torch.Tensor, t: torch.Tensor, c: Conditions) -> dict[str, Any]:
    """x [B, 16, H, W]."""
    return {
        "hidden_states": x,
        "timestep": t,
        "encoder_hidden_states": c["cross_attn"],
        "pooled_projections": c["pooled_output"],
    }


def wan(_, x: torch.Tensor, t: torch.Tensor, c: Conditions) -> dict[str, Any]:
    """x [B, C, T, H, W]; the text is padded with zeros to 512 tokens, as ComfyUI's and diffusers' encoders give it."""
    text = c["cross_attn"]
    if text.shape[1] < 512:
        text = torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))
    return {"hidden_states": x, "timestep": t, "encoder_hidden_states": text}


def same(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A latent as it is; the second half of the channels, where there is one, is the learned variance."""
    return y[:, : x.shape[1]]


def frames_second(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[B, T, C, H, W] -> [B, C, T, H, W]."""
    return y.transpose(1, 2)


def unfolded(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[B, T H W, C] -> [B, C, T, H, W]."""
    return y.transpose(1, 2).reshape(x.shape)


def unpacked(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[B, H/2 W/2, 64] -> [B, 16, H, W]."""
    batch, channels, height, width = x.shape
    y = y.view(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return y.reshape(x.shape)
