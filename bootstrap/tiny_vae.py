"""LTX-Video's VAE in a few thousand weights: core's class, its compression of 8 x 32 x 32 and its 128 channels, found and
loaded by core from a state dict and a config, as the released files are."""

import json
from typing import Any

import torch
from pack import use_comfyui
from tiny_models import state_dict
from tiny_specs import SPECS

use_comfyui()

import comfy.sd
from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE

WIDTH = 4  # channels of the last level
MODEL = SPECS["ltxv_meta"]


def config(conditioned: bool = True, inject: bool = False) -> dict[str, Any]:
    """conditioned: the decoder takes a timestep, as from 0.9.1 on. inject: it draws noise of its own inside, as 0.9.1's."""
    up = ["compress_all", {"residual": True, "multiplier": 2}]
    level = ["res_x", {"num_layers": 1, "inject_noise": inject}]
    return {
        "_class_name": "CausalVideoAutoencoder", "dims": 3, "in_channels": 3, "out_channels": 3, "latent_channels": 128,
        "encoder_blocks": [["compress_all", {}], ["compress_all", {}], ["compress_all", {}]],
        "decoder_blocks": [level, up, ["res_x", {"num_layers": 1}], up, ["res_x", {"num_layers": 1}], up, level],
        "encoder_base_channels": WIDTH, "decoder_base_channels": WIDTH, "norm_layer": "pixel_norm", "patch_size": 4,
        "latent_log_var": "uniform", "causal_decoder": False, "timestep_conditioning": conditioned,
    }  # fmt: skip


def metadata(**kind: bool) -> dict[str, str]:
    return {"config": json.dumps({"vae": config(**kind)})}


def weights(**kind: bool) -> dict[str, torch.Tensor]:
    """Random ones in fp32 that keep activations near unit size."""
    generator = torch.Generator().manual_seed(3)
    out = {}
    for key, value in VideoVAE(config=config(**kind)).state_dict().items():
        if "std-of-means" in key or key.endswith("timestep_scale_multiplier"):
            made = torch.full(value.shape, 1000.0 if "multiplier" in key else 0.8)
        elif value.ndim >= 2 or "per_channel" in key:
            made = torch.randn(value.shape, generator=generator) / max(1, value[0].numel()) ** 0.5
        else:
            made = torch.zeros(value.shape)
        out[key] = made
    return out


def load(dtype: torch.dtype = torch.float32, **kind: bool) -> Any:
    """What Load VAE does."""
    return comfy.sd.VAE(sd=weights(**kind), metadata=metadata(**kind), dtype=dtype)


def checkpoint() -> dict[str, torch.Tensor]:
    """Model and VAE as a checkpoint of LTX-Video holds them; sizes_of has its metadata."""
    model = {f"model.diffusion_model.{key}": value for key, value in state_dict(MODEL).items()}
    return model | {f"vae.{key}": value for key, value in weights().items()}


def sizes_of(name: str) -> dict[str, str] | None:
    """Metadata of the stand-in of that name; None where it has none."""
    sizes = {"transformer": dict(MODEL.metadata), "vae": config()}
    return {"config": json.dumps(sizes)} if name.startswith("ltxv-") else None
