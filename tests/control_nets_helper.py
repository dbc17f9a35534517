"""Small control nets of core's own classes, with random weights, and models that they control."""

import functools
from dataclasses import replace

import comfy.cldm.cldm
import comfy.cldm.dit_embedder
import comfy.cldm.mmdit
import comfy.controlnet
import comfy.latent_formats
import comfy.ldm.flux.controlnet
import comfy.ldm.hydit.controlnet
import comfy.ldm.qwen_image.controlnet
import comfy.ops
import comfy.t2i_adapter.adapter
import torch
from nodes_helper import _outputs
from stand_ins import SD15
from tiny_models import build_direct, tiny
from tiny_specs import SPECS

KEYS = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
FLUX, SD3, QWEN = (dict(SPECS[name].arguments) for name in ("flux", "sd3", "qwen_image"))
SMALL = {
    **SD15.arguments, "model_channels": 64, "context_dim": 64, "num_heads": 2, "num_res_blocks": [2, 2],
    "transformer_depth": [1] * 4, "transformer_depth_output": [1] * 6,
}  # fmt: skip
SD = replace(SD15, arguments=SMALL, context=(1, 6, 64))
UNET = {key: value for key, value in SMALL.items() if key not in ("out_channels", "transformer_depth_output")}


def filled(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights under which activations stay near unit size."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.ndim >= 2:
            value.data = torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5
        else:
            value.data = torch.zeros_like(value) if name.endswith("bias") else torch.ones_like(value)
    return module.eval().requires_grad_(False)


def wrapped(module, kind=comfy.controlnet.ControlNet, **settings):
    return kind(filled(module), load_device=torch.device("cpu"), **settings)


def flux(doubles=3, singles=2, **settings):
    """InstantX's kind: it takes a latent, and repeats each block's residual over the blocks of FLUX."""
    sizes = {**FLUX, "depth": doubles, "depth_single_blocks": singles}
    net = comfy.ldm.flux.controlnet.ControlNetFlux(latent_input=True, control_latent_channels=16, **sizes, **KEYS)
    return wrapped(
        net, compression_ratio=1, latent_format=comfy.latent_formats.Flux(), extra_conds=["y", "guidance"], **settings
    )


def xlabs():
    """It takes pixels, and repeats its blocks in turn."""
    sizes = {**FLUX, "depth": 3, "depth_single_blocks": 0}
    return wrapped(comfy.ldm.flux.controlnet.ControlNetFlux(**sizes, **KEYS), extra_conds=["y", "guidance"])


def sd3(blocks=3):
    sizes = {
        **SD3,
        "depth": 6,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 96, "out_features": 384}},
    }
    net = comfy.cldm.mmdit.ControlNet(num_blocks=blocks, control_latent_channels=16, **sizes, **KEYS)
    return wrapped(net, compression_ratio=1, latent_format=comfy.latent_formats.SD3())


def sd35():
    net = comfy.cldm.dit_embedder.ControlNetEmbedder(
        None, 2, 16, attention_head_dim=64, num_attention_heads=2, adm_in_channels=64, num_layers=3, main_model_double=6,
        double_y_emb=False, pos_embed_max_size=16, **KEYS,
    )  # fmt: skip
    return wrapped(net, compression_ratio=1, latent_format=comfy.latent_formats.SD3())


def hunyuan():
    net = comfy.ldm.hydit.controlnet.HunYuanControlNet(
        hidden_size=128,
        depth=40,
        num_heads=2,
        text_states_dim=64,
        text_states_dim_t5=48,
        text_len=6,
        text_len_t5=4,
        **KEYS,
    )
    extra = ["text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5"]
    return wrapped(net, compression_ratio=1, latent_format=comfy.latent_formats.SDXL(), extra_conds=extra)


def qwen():
    net = comfy.ldm.qwen_image.controlnet.QwenImageControlNetModel(**{**QWEN, "num_layers": 3}, **KEYS)
    return wrapped(net, compression_ratio=1, latent_format=comfy.latent_formats.Wan21(), extra_conds=[])


def unet():
    return wrapped(comfy.cldm.cldm.ControlNet(hint_channels=3, **UNET, **KEYS))


def lora():
    """What it holds itself are the projections and the hint's own layers; the rest is the model's at run time."""
    weights = filled(comfy.cldm.cldm.ControlNet(hint_channels=3, **UNET, **KEYS)).state_dict()
    own = ("zero_convs", "input_hint_block", "middle_block_out")
    return comfy.controlnet.ControlLora({key: value for key, value in weights.items() if key.startswith(own)})


def adapter():
    net = filled(comfy.t2i_adapter.adapter.Adapter_light(cin=64 * 3, channels=[64, 64, 128, 128], nums_rb=1))
    return comfy.controlnet.T2IAdapter(net, 3, 8, "nearest-exact", device=torch.device("cpu"))


class Vae:
    """A latent of so many channels from the means of cells of 8 x 8 pixels, and the way back."""

    def __init__(self, channels=16, video=False):
        self.channels, self.video = channels, video

    def spacial_compression_encode(self):
        return 8

    def encode(self, pixels):
        cells = torch.nn.functional.avg_pool2d(pixels[..., :3].movedim(-1, 1), 8)
        cells = torch.cat([cells] * (self.channels // 3 + 1), 1)[:, : self.channels]
        return cells[:, :, None] if self.video else cells

    def decode(self, samples):
        return samples[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3).movedim(1, -1)


class Sampling:
    """As much of a model as a control net asks for outside of a run."""

    model_sampling = property(lambda self: self)

    def timestep(self, sigma):
        return sigma

    def calculate_input(self, sigma, x):
        return x


def residuals(net, name, strength=1.0, previous=None):
    """What a copy of that net gives for one evaluation, the same each time: lists by name."""
    net, video = net.copy(), name == "qwen"
    channels = 4 if name in ("hunyuan", "unet", "adapter") else 16
    vae = Vae(channels, video) if net.latent_format is not None else None
    generator = torch.Generator().manual_seed(5)
    net.set_cond_hint(torch.rand(1, 3, 64, 96, generator=generator), strength, (0.0, 1.0), vae=vae)
    net.set_previous_controlnet(previous)
    net.pre_run(Sampling(), lambda percent: 1 - percent)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    x = draw(2, channels, 1, 8, 12) if video else draw(2, channels, 8, 12)
    width = {"hunyuan": 64, "unet": 64}.get(name, 96)
    cond = {"c_crossattn": draw(2, 6, width), "y": draw(2, 64), "guidance": torch.ones(2)}
    if name == "hunyuan":
        cond |= {"text_embedding_mask": torch.ones(2, 6), "text_embedding_mask_t5": torch.ones(2, 4),
                 "encoder_hidden_states_t5": draw(2, 4, 48)}  # fmt: skip
    with torch.inference_mode():
        found = net.get_control(x, torch.full((2,), 0.5), cond, 1, {})
    net.cleanup()
    return found


@functools.cache
def _sd15():
    return build_direct(SD)


def sd15():
    model = _sd15().clone()
    _outputs.append(model)
    return model, SD


def flux_model():
    model, spec = tiny("flux")
    _outputs.append(model)
    return model, spec


NETS = {
    "flux": flux, "xlabs": xlabs, "sd3": sd3, "sd35": sd35, "hunyuan": hunyuan, "qwen": qwen, "unet": unet, "adapter": adapter
}  # fmt: skip
