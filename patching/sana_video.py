"""SANA-Video as a ComfyUI MODEL: our network under its wrappers and its softmax attention, in a BaseModel that samples a
flow, takes a prompt of Gemma 2 and, for frames that a noise mask keeps, time step 0."""

from dataclasses import asdict
from typing import Any, ClassVar

import comfy.conds
import comfy.latent_formats as formats
import comfy.ldm.common_dit
import comfy.model_base
import comfy.model_management
import comfy.supported_models_base
import torch
from comfy.ldm.modules import attention as core
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers

from ..networks import sana_video as networks
from ..networks.sana_layers import CrossAttention, LinearAttention, Sizes
from .diffusers_model import REFUSED
from .diffusers_sampling import Noise

NAME = "SANA-Video"
TIMES = 1000.0  # what the network counts to
MEMORY = 2.0
MARK = "sana_"  # before sizes in a family's config, which files of quantized weights hold


def attend(q, k, v, heads: int, mask=None, transformer_options=None) -> torch.Tensor:
    """By whatever attention ComfyUI has set up."""
    return core.optimized_attention(q, k, v, heads, mask=mask, transformer_options=transformer_options or {})


class SanaVideo(networks.SanaVideo):
    """The network as ComfyUI calls a diffusion model."""

    network: ClassVar[str] = "SanaVideo"
    weight_dtype: torch.dtype = torch.float32

    def __init__(self, sizes: Sizes, exact: bool = True):
        super().__init__(sizes)
        for module in self.modules():
            if isinstance(module, CrossAttention):
                module.attend = attend
            elif isinstance(module, LinearAttention):
                module.exact = exact

    @property
    def dtype(self) -> torch.dtype:
        return self.weight_dtype

    def forward(self, x, timestep, context=None, control=None, transformer_options=None, **conditions):
        """x [B, C, T, H, W] -> the prediction, of the same shape."""
        options = {} if transformer_options is None else transformer_options
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        run = WrapperExecutor.new_class_executor(self.whole, self, wrappers)
        return run.execute(x, timestep, context, control=control, transformer_options=options, **conditions)

    def whole(self, x, timestep, context=None, control=None, transformer_options=None, attention_mask=None, **_):
        if control is not None:
            raise ValueError(f"ControlNets cannot act on {NAME}. Remove it.")
        sides = x.shape[2:]
        padded = comfy.ldm.common_dit.pad_to_patch_size(x, self.sizes.patch)
        made = self.denoise(padded, timestep, context, attention_mask, transformer_options)
        return made[(..., *(slice(0, side) for side in sides))]


def family(sizes: Sizes, noise: Noise) -> comfy.supported_models_base.BASE:
    """What a BaseModel reads of a family. ValueError for latents that no known autoencoder makes."""
    latents = {16: formats.Wan21, 128: formats.LTXV}.get(sizes.channels)
    if latents is None:
        raise ValueError(
            f"This {NAME} has latents of {sizes.channels} channels; those of 16 (Wan 2.1) and 128 (LTX-2) are known."
        )

    class Family(comfy.supported_models_base.BASE):
        unet_config: ClassVar[dict[str, Any]] = {}
        unet_extra_config: ClassVar[dict[str, Any]] = {}
        sampling_settings = noise.settings
        supported_inference_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float32]
        memory_usage_factor = MEMORY
        latent_format = latents

        def inpaint_model(self):
            return False

    told = {f"{MARK}{key}": value for key, value in {**asdict(sizes), "shift": noise.settings["shift"]}.items()}
    return Family({"disable_unet_model_creation": True, "in_channels": sizes.channels, **told})


class SanaVideoModel(comfy.model_base.HiDream):
    """Derived from HiDream because core gives LoRA names of diffusers ("transformer.", "lycoris_") to this class and to none
    of a table; nothing else of it is used."""

    def __init__(self, made, noise: Noise, diffusion_model: SanaVideo):
        comfy.model_base.BaseModel.__init__(self, made, noise.kind)
        self.diffusion_model = diffusion_model
        comfy.model_management.archive_model_dtypes(diffusion_model)

    def process_timestep(self, timestep, x, denoise_mask=None, **_):
        """As the network counts them, whether the MODEL's sampling node counts to 1 or to 1,000 [B]; of frames [B, T] or
        tokens [B, N], where a mask [B, 1, T, H, W] keeps some."""
        times = timestep * (TIMES / float(self.model_sampling.timestep(torch.ones(()))))
        if denoise_mask is None:
            return times
        sides, patch = [1, *x.shape[2:]], self.diffusion_model.sizes.patch
        mask = denoise_mask.float()[:, :1].expand(len(times), *sides)
        mask = comfy.ldm.common_dit.pad_to_patch_size(mask, patch, padding_mode="replicate")
        mask = torch.nn.functional.max_pool3d(mask, patch, patch)[:, 0]  # a patch with something to be made is made
        frames = mask.flatten(2)
        same = bool((frames == frames[..., :1]).all())
        return (frames[..., 0] if same else frames.flatten(1)) * times[:, None]

    def scale_latent_inpaint(self, sigma, noise, latent_image, **_):
        """What is kept is clean at every step, as its time step says."""
        return latent_image

    def concat_cond(self, **_):
        return None

    def encode_adm(self, **_):
        return None

    def extra_conds(self, **kwargs):
        for key, words in REFUSED.items():
            if kwargs.get(key) is not None:
                raise ValueError(f"{NAME} does not take {words}, and this CONDITIONING has it ({key}).")
        text, mask, found = kwargs.get("cross_attn"), kwargs.get("attention_mask"), {}
        width = self.diffusion_model.sizes.text
        if text is None:
            raise ValueError(f"{NAME} needs a prompt. Connect its text encoder's CONDITIONING.")
        if text.shape[-1] != width:
            raise ValueError(
                f"{NAME} was made for text of width {width}, and this CONDITIONING has {text.shape[-1]}. Encode the prompt with "
                "Gemma 2 2B (Load CLIP, type pixeldit)."
            )
        found["c_crossattn"] = comfy.conds.CONDRegular(text)
        if mask is not None and not bool((mask == 1).all()):
            found["attention_mask"] = comfy.conds.CONDRegular(mask)
        if kwargs.get("denoise_mask") is not None:
            found["denoise_mask"] = comfy.conds.CONDRegular(kwargs["denoise_mask"])
        return found
