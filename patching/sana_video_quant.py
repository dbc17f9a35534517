"""SANA-Video in a file of quantized weights, which ComfyUI's own loader does not know."""

import json
from collections.abc import Mapping
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch

from ..networks.sana_layers import Sizes
from .diffusers_sampling import noise_of
from .layers import quantizable, unplaced
from .sana_video import MARK, SanaVideo, SanaVideoModel, family
from .sana_video_load import SCHEDULE, inferred

KEYS = frozenset({"patch_embedding.weight", "caption_norm.weight", "transformer_blocks.0.ff.conv_temp.weight"})


def is_sana_video(tensors: Mapping[str, Any]) -> bool:
    return tensors.keys() >= KEYS


def made(
    name: str,
    tensors: dict[str, Any],
    metadata: Mapping[str, str],
    operations: Any,
    dtype: torch.dtype,
    disable_dynamic: bool,
):
    """The ModelPatcher. What it misses or leaves it tells the log, as ComfyUI's loader does. dtype: what is computed in."""
    told = json.loads(metadata.get("config", "{}")).get("transformer", {})
    own = {key.removeprefix(MARK): value for key, value in told.items() if key.startswith(MARK)}
    shift = own.pop("shift", SCHEDULE["flow_shift"])
    if own:
        try:
            sizes = Sizes(**{**own, "patch": tuple(own["patch"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"{name}: its metadata `config` is not of SANA-Video; the file is damaged.") from error
    else:
        sizes = inferred(name, {key: tuple(value.shape) for key, value in tensors.items()})
    noise = noise_of({**SCHEDULE, "flow_shift": shift}, name)
    kind = family(sizes, noise)
    kind.set_inference_dtype(dtype, None)
    with unplaced():
        network = SanaVideo(sizes)
    quantizable(network, operations)
    network.weight_dtype = dtype
    model = SanaVideoModel(kind, noise, network)
    model.load_model_weights(tensors, "", assign=True)
    network.requires_grad_(False).eval()
    patcher = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    device = comfy.model_management.get_torch_device()
    return patcher(model, load_device=device, offload_device=comfy.model_management.unet_offload_device())
