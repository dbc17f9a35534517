"""DynamiCtrl's transformer as a MODEL: ComfyUI's own CogVideoX from renamed tensors, with the rotations that diffusers
gives it, and the added norms as one additional model, which core loads, counts and unloads with the MODEL."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.ldm.common_dit
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import torch
from comfy.patcher_extension import WrappersMP

from .. import archs
from ..methods.control.dynamictrl import (
    LATENT,
    MARK,
    PATCH,
    POSITIONS,
    REMEDY,
    Sizes,
    build,
    check,
    core_key,
    expected,
    read_sizes,
    rotation,
)
from ..methods.files.finite import finite
from ..methods.files.header import read_header
from ..methods.files.place import Damaged
from .diffusers_files import CONFIG, read_json, read_tensors, weight_files
from .load_checks import Heard, check_model

NAME = "Load DynamiCtrl"
NORMS = "tessera_dynamictrl"  # key of the additional model, and of the attachment
SAMPLE = {False: (60, 90), True: (96, 170)}  # latent height and width that version 1.0 and 1.5 were trained at


@dataclass(frozen=True, eq=False)
class PoseNorms:
    """What Load DynamiCtrl leaves on a MODEL for Apply Pose Control."""

    norms: torch.nn.ModuleList
    sizes: Sizes


class Rotation:
    """In place of the model's rotary table. ComfyUI's multiplies the places of version 1.0 by 1.875 and knows no crop.
    It holds nothing of the model, so it may move to a quantized copy."""

    unbound = True

    def __init__(self, sizes: Sizes, sample: tuple[int, int]):
        self.sizes, self.base = sizes, (sample[0] // PATCH, sample[1] // PATCH)

    def __call__(self, h: int, w: int, t: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) [T H W, 64] of that many tokens."""
        return rotation((t, h, w), self.base, self.sizes.joined, device)


class LearnedSize:
    """A DIFFUSION_MODEL wrapper that refuses videos for which there are no learned positions."""

    def __init__(self, sizes: Sizes, sample: tuple[int, int]):
        self.sizes, self.base = sizes, (sample[0] // PATCH, sample[1] // PATCH)

    def __call__(self, executor, x: torch.Tensor, *args, **kwargs):
        network, (high, wide) = executor.class_obj, self.base
        t, h, w = (-(-side // p) for side, p in zip(x.shape[2:], patch_of(network), strict=True))
        most = (self.sizes.positions - network.max_text_seq_length) // (high * wide)
        if (h, w) != self.base or t > most:
            raise ValueError(
                f"This DynamiCtrl has learned positions for {high} x {wide} tokens (height x width) in up to {most} "
                f"latent frames, and the latent has {h} x {w} in {t}. Make the video {wide * 16} x {high * 16} pixels."
            )
        return executor(x, *args, **kwargs)


def patch_of(network: Any) -> tuple[int, int, int]:
    """Latent cells (t, h, w) of a token."""
    return (network.patch_size_t or 1, network.patch_size, network.patch_size)


def _config(chosen: Path) -> dict[str, Any]:
    """The config of a folder or beside a file; {} where there is none."""
    places = [chosen / CONFIG] if chosen.is_dir() else [chosen.with_suffix(".json"), chosen.with_name(CONFIG)]
    return next((read_json(path) for path in places if path.is_file()), {})


def _sample(config: dict[str, Any], sizes: Sizes, name: str) -> tuple[int, int]:
    """Latent height and width that it was trained at."""
    found = tuple(config.get(f"sample_{side}", SAMPLE[sizes.joined][n]) for n, side in enumerate(("height", "width")))
    if not all(type(n) is int and PATCH <= n <= 4096 for n in found):
        raise ValueError(f"{name}: its config tells a sample size of {found}, which is none. {REMEDY}")
    return found[0], found[1]


def read(chosen: Path) -> tuple[Sizes, dict[str, torch.Tensor], tuple[int, int]]:
    """(sizes, tensors under diffusers' names, sample size) of a file or a folder with its parts. ValueError, one
    sentence, where it is damaged, another model, not whole or not finite."""
    files, shapes = weight_files(chosen), {}
    try:
        for path in files:
            shapes |= {key: tuple(entry.shape) for key, entry in read_header(path).tensors.items()}
    except Damaged as error:
        raise ValueError(f"{path.name} is damaged or no safetensors file ({error.why}). {REMEDY}") from error
    sizes = read_sizes(shapes, chosen.name)
    want = expected(sizes)
    check(shapes, want, chosen.name)
    tensors = read_tensors(files, {key: torch.Size(shape) for key, shape in want.items()})
    lost = next((key for key, tensor in tensors.items() if not finite(tensor)), None)
    if lost is not None:
        raise ValueError(f"{chosen.name}: {lost} {[*tensors[lost].shape]} is not finite. {REMEDY}")
    return sizes, tensors, _sample(_config(chosen), sizes, chosen.name)


def load(path: str, disable_dynamic: bool = False) -> Any:
    """The MODEL of that file or folder."""
    chosen = Path(path)
    sizes, tensors, sample = read(chosen)
    weights = {core_key(k): v for k, v in tensors.items() if MARK not in k and k != POSITIONS}
    with Heard() as heard:
        model = comfy.sd.load_diffusion_model_state_dict(weights, {}, {}, disable_dynamic=disable_dynamic)
    if model is None:
        raise ValueError(f"{chosen.name}: this ComfyUI does not know CogVideoX. Update ComfyUI.")
    network = model.model.diffusion_model
    check_model(chosen.name, network, heard)
    if sizes.positions:  # core would take a file with this table for one without rotations
        embed = network.patch_embed
        embed.register_buffer("pos_embedding", tensors[POSITIONS].clone())
        embed.use_learned_positional_embeddings = True
        model.size = 0  # to be counted again
        model.model_size()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, NORMS, LearnedSize(sizes, sample))
    model.add_object_patch("diffusion_model.use_rotary_positional_embeddings", True)
    model.add_object_patch("diffusion_model._get_rotary_emb", Rotation(sizes, sample))
    norms = build(sizes, tensors, comfy.ops.manual_cast)
    model.set_attachments(NORMS, PoseNorms(norms, sizes))
    beside = comfy.model_patcher.ModelPatcher(
        norms, load_device=model.load_device, offload_device=comfy.model_management.unet_offload_device()
    )
    model.set_additional_models(NORMS, [beside])
    model.cached_patcher_init = (load, (path,))
    return model


def norms_of(model: Any, node: str) -> PoseNorms:
    """ValueError where the MODEL has none."""
    found = model.get_attachment(NORMS)
    if found is None:
        kind = archs.class_name(model.model.diffusion_model)
        raise ValueError(
            f"{node} needs the MODEL of Load DynamiCtrl, which holds the norms that take the pose in; this {kind} has "
            "none."
        )
    return found


def tokens(network: Any, latent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """c_0: a pose latent [b, 16, T, h, w] on the model's device -> [b, N, D]. Its two halves are the same."""
    both = latent.to(dtype).repeat(1, network.in_channels // LATENT, 1, 1, 1)
    both = comfy.ldm.common_dit.pad_to_patch_size(both, patch_of(network)).movedim(2, 1)
    nothing = both.new_zeros(both.shape[0], 0, network.patch_embed.text_proj.in_features)
    return network.patch_embed(nothing, both)
