"""A transformer of diffusers as a ComfyUI MODEL: its class, derived so that ComfyUI can call it, in a BaseModel that
samples by its own noise levels and takes the conditions that its row in the table names."""

from typing import Any, ClassVar

import comfy.conds
import comfy.ldm.common_dit
import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.supported_models_base
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers

from .diffusers_blocks import running
from .diffusers_processors import keep_eager
from .diffusers_sampling import Noise, install
from .diffusers_table import Row
from .run import find_options

REFUSED = {  # keys of CONDITIONING that would be lost on every bridged class
    "concat_latent_image": "an image to start from",
    "reference_latents": "reference images",
    "clip_vision_output": "an image prompt",
    "gligen": "GLIGEN boxes",
    "control": "a ControlNet",
}


class Bridge(torch.nn.Module):
    """In front of a class of diffusers in the order of bases: `forward` as ComfyUI calls a diffusion model."""

    bridged: ClassVar[type]
    row: ClassVar[Row]
    weight_dtype: torch.dtype = torch.float32

    @property
    def dtype(self) -> torch.dtype:
        return self.weight_dtype

    def forward(self, x, timestep, context=None, control=None, transformer_options=None, **conditions):
        """x [B, C, (T,) H, W] -> the prediction, of the same shape."""
        options = {} if transformer_options is None else transformer_options
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        run = WrapperExecutor.new_class_executor(self.denoise, self, wrappers)
        return run.execute(x, timestep, context, control=control, transformer_options=options, **conditions)

    def denoise(self, x, timestep, context=None, control=None, transformer_options=None, **conditions):
        if control is not None:
            raise ValueError(f"ControlNets cannot act on {self.bridged.__name__} of diffusers. Remove it.")
        row, sides = self.row, x.shape[2:]
        padded = comfy.ldm.common_dit.pad_to_patch_size(x, row.patch(self.config)) if self._ragged(sides) else x
        arguments = row.arguments(self, padded, timestep, conditions)
        token = running.set(transformer_options)
        try:
            made = super().forward(**arguments, return_dict=False)[0]
        finally:
            running.reset(token)
        made = row.answer(made, padded)
        return made[(..., *(slice(0, side) for side in sides))]

    def _ragged(self, sides) -> bool:
        return any(side % part for side, part in zip(sides, self.row.patch(self.config), strict=True))


def settings(row: Row, config: dict[str, Any], noise: Noise, latents) -> comfy.supported_models_base.BASE:
    """What a BaseModel reads of a family: there is one family for each loaded model here."""

    class Family(comfy.supported_models_base.BASE):
        unet_config: ClassVar[dict[str, Any]] = {}
        unet_extra_config: ClassVar[dict[str, Any]] = {}
        sampling_settings = noise.settings
        memory_usage_factor = row.memory

        def inpaint_model(self):
            return False

    family = Family({"disable_unet_model_creation": True, "in_channels": config["in_channels"]})
    family.latent_format = latents
    return family


class BridgedModel(comfy.model_base.HiDream):
    """Conditions by the table. Derived from HiDream because core gives LoRA names of diffusers ("transformer.",
    "lycoris_") to this class and to none of a table; nothing else of it is used."""

    def __init__(self, family, noise: Noise, diffusion_model: Bridge):
        comfy.model_base.BaseModel.__init__(self, family, noise.kind)
        self.model_sampling = install(self.model_sampling, noise)
        self.flows = noise.alphas is None
        self.diffusion_model = diffusion_model
        comfy.model_management.archive_model_dtypes(diffusion_model)

    def apply_model(self, *args, **kwargs):
        if any("torch.compile" in keys for keys in find_options(args, kwargs).get("wrappers", {}).values()):
            keep_eager(self.diffusion_model)
        return super().apply_model(*args, **kwargs)

    def process_timestep(self, timestep, **_):
        """Timesteps of flows as the class counts them, whether the MODEL's sampling node counts to 1 or to 1,000."""
        if self.flows:
            return timestep * (self.diffusion_model.row.times / float(self.model_sampling.timestep(torch.ones(()))))
        return timestep

    def concat_cond(self, **_):
        return None

    def encode_adm(self, **_):
        return None

    def extra_conds(self, **kwargs):
        model = self.diffusion_model
        name, row, config = model.bridged.__name__, model.row, model.config
        for key, words in REFUSED.items():
            if kwargs.get(key) is not None:
                raise ValueError(
                    f"{name} of diffusers does not take {words} here, and this CONDITIONING has it ({key})."
                )
        noise, found = kwargs["noise"], {}
        for key, asked in row.takes.items():
            wanted = asked == "" or (asked is not None and bool(config[asked]))
            value = self._size(noise, kwargs) if key == "size" else kwargs.get(key, row.assumed.get(key))
            if value is None and wanted:
                raise ValueError(f"{name} needs {WORDS[key]}.")
            if value is not None and (wanted or asked is None):
                value = value if torch.is_tensor(value) else torch.tensor([value])
                self._check_width(name, key, value, config, row)
                found[key] = comfy.conds.CONDRegular(value)
        return found

    def _check_width(self, name: str, key: str, value: torch.Tensor, config, row: Row) -> None:
        entry = {"cross_attn": row.text, "pooled_output": row.pooled}.get(key)
        if entry and value.shape[-1] != config[entry]:
            raise ValueError(
                f"{name} was made for {key} of width {config[entry]}, and this CONDITIONING has {value.shape[-1]}. Encode the "
                "prompt with the model's own text encoders."
            )

    def _size(self, noise: torch.Tensor, kwargs) -> torch.Tensor:
        """Height and width in pixels [1, 2]: of the CONDITIONING, else of the latent."""
        ratio = self.latent_format.spacial_downscale_ratio
        sides = kwargs.get("height"), kwargs.get("width")
        if None in sides:
            sides = noise.shape[-2] * ratio, noise.shape[-1] * ratio
        return torch.tensor([sides], dtype=torch.float32)


WORDS = {
    "cross_attn": "a prompt. Connect its text encoder's CONDITIONING",
    "pooled_output": "a pooled text (pooled_output), which this CONDITIONING lacks. Encode with CLIP as well as T5",
    "class_label": "a class. Connect Class Label to positive and negative",
    "size": "a size",
}
