"""The classes of diffusers that are bridged, one row each: what they predict over which noise levels, their latents, and
which conditions they take. What a row does not name is refused."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import comfy.latent_formats as formats
import torch

from . import diffusers_arguments as calls
from .diffusers_latents import SanaLatents, StillLatents

LINEAR = {"prediction_type": "epsilon", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
ZERO_SNR = {
    "prediction_type": "v_prediction",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "rescale_betas_zero_snr": True,
}


def flow(shift: float, **more: Any) -> dict[str, Any]:
    return {"prediction_type": "flow_prediction", "shift": shift, **more}


@dataclass(frozen=True)
class Row:
    """One class. schedule: settings of diffusers' schedulers where no scheduler_config.json lies beside the model.
    text: config entry with the width of its text. takes: keys of CONDITIONING that become conditions, each with the
    config entry that asks for it ("" always, None if present); pooled: config entry with the pooled width."""

    arguments: Callable[..., dict[str, Any]]
    schedule: Callable[[dict[str, Any]], dict[str, Any]]
    latents: Callable[[dict[str, Any]], formats.LatentFormat | None]
    takes: Mapping[str, str | None]
    text: str = ""
    pooled: str = ""
    answer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = calls.same
    patch: Callable[[Any], tuple[int, ...]] = lambda config: (config["patch_size"],) * 2
    channels: int = 1  # of the model's input for each of the latent
    times: int = 1000  # the timestep at sigma 1 of a flow
    memory: float = 1.0  # core's memory_usage_factor
    learned: bool = False  # may give a variance beside its prediction
    refuses: Mapping[str, Any] = field(default_factory=dict)  # config entries that must have this value
    assumed: Mapping[str, Any] = field(
        default_factory=dict
    )  # conditions where CONDITIONING lacks them, as core has them


def _pixart_latents(config: dict[str, Any]) -> formats.LatentFormat | None:
    """alpha draws in Stable Diffusion's latents, sigma in SDXL's. Both have 256- and 512-pixel models of one config."""
    size, told = config["sample_size"], config.get("use_additional_conditions")
    if size in (32, 64):
        return None
    return formats.SD15() if told or (told is None and size == 128) else formats.SDXL()


def _wan_latents(config: dict[str, Any]) -> formats.LatentFormat | None:
    return {16: formats.Wan21, 48: formats.Wan22}.get(config["in_channels"], lambda: None)()


def _cog_latents(config: dict[str, Any]) -> formats.LatentFormat:
    return formats.CogVideoX1_5() if config["use_rotary_positional_embeddings"] else formats.CogVideoX()


def _cog_schedule(config: dict[str, Any]) -> dict[str, Any]:
    return {**ZERO_SNR, "snr_shift_scale": 1.0 if config["use_rotary_positional_embeddings"] else 3.0}


def _flux_schedule(config: dict[str, Any]) -> dict[str, Any]:
    return flow(1.0, use_dynamic_shifting=True, max_shift=1.15) if config["guidance_embeds"] else flow(1.0)


TEXT = {"cross_attn": ""}
MASKED = {**TEXT, "attention_mask": None}
SPRINT = {"guidance_embeds": False}  # distilled for a sampler of its own, with timesteps that count otherwise
VIDEO_PATCH = {"patch": lambda config: tuple(config["patch_size"])}

TABLE = {
    "DiTTransformer2DModel": Row(
        calls.dit, lambda _: LINEAR, lambda _: formats.SD15(), {"class_label": ""}, memory=0.5, learned=True
    ),
    "PixArtTransformer2DModel": Row(
        calls.pixart,
        lambda _: LINEAR,
        _pixart_latents,
        {**MASKED, "size": ""},
        "caption_channels",
        memory=0.5,
        learned=True,
    ),
    "SanaTransformer2DModel": Row(
        calls.sana,
        lambda _: flow(3.0),
        lambda _: SanaLatents(),
        MASKED,
        "caption_channels",
        memory=6.0,
        refuses=SPRINT,
    ),
    "SanaVideoTransformer3DModel": Row(
        calls.sana,
        lambda _: flow(8.0),
        lambda config: formats.Wan21() if config["in_channels"] == 16 else None,
        MASKED,
        "caption_channels",
        memory=2.0,
        refuses=SPRINT,
        **VIDEO_PATCH,
    ),
    "CogVideoXTransformer3DModel": Row(
        calls.cogvideox,
        _cog_schedule,
        _cog_latents,
        TEXT,
        "text_embed_dim",
        answer=calls.frames_second,
        patch=lambda config: (1, config["patch_size"], config["patch_size"]),
        memory=2.0,
    ),
    "LatteTransformer3DModel": Row(
        calls.latte,
        lambda _: LINEAR,
        lambda _: StillLatents(),
        TEXT,
        "caption_channels",
        patch=lambda config: (1, config["patch_size"], config["patch_size"]),
        memory=0.5,
        learned=True,
    ),
    "LTXVideoTransformer3DModel": Row(
        calls.ltx,
        lambda _: flow(1.0, use_dynamic_shifting=True, max_shift=2.37),
        lambda _: formats.LTXV(),
        {**MASKED, "frame_rate": None},
        "caption_channels",
        answer=calls.unfolded,
        patch=lambda _: (1, 1, 1),
        memory=5.5,
        refuses={"patch_size": 1, "patch_size_t": 1},
    ),
    "FluxTransformer2DModel": Row(
        calls.flux,
        _flux_schedule,
        lambda _: formats.Flux(),
        {**TEXT, "pooled_output": "", "guidance": "guidance_embeds"},
        "joint_attention_dim",
        "pooled_projection_dim",
        answer=calls.unpacked,
        patch=lambda _: (2, 2),
        channels=4,
        times=1,
        memory=3.1,
        assumed={"guidance": 3.5},
    ),
    "SD3Transformer2DModel": Row(
        calls.sd3,
        lambda _: flow(3.0),
        lambda _: formats.SD3(),
        {**TEXT, "pooled_output": ""},
        "joint_attention_dim",
        "pooled_projection_dim",
        memory=1.6,
    ),
    "WanTransformer3DModel": Row(
        calls.wan,
        lambda _: flow(8.0),
        _wan_latents,
        TEXT,
        "text_dim",
        memory=2.0,
        refuses={"image_dim": None, "added_kv_proj_dim": None},
        **VIDEO_PATCH,
    ),
}
