"""Further DiT classes at tiny size, called directly instead of through a loader and a sampler: variants of known
families, audio and 3-D models. They check what the architecture files say about them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny_models import construct, state_dict
from tiny_specs import Shape, Spec


@dataclass(frozen=True)
class Variant(Spec):
    """A Spec whose `ones` and `randoms` are arguments of forward, as are these."""

    constants: Mapping[str, Any] = field(default_factory=dict)


# fmt: off

WAN = dict(dim=128, ffn_dim=128, num_heads=1, num_layers=2, text_dim=64)
WAN_LATENT: Shape = (1, 16, 3, 8, 8)
WAN_CONTEXT: Shape = (1, 12, 64)
CLIP = dict(clip_fea=(1, 5, 1280))
NEXT_DIT = dict(
    patch_size=8, in_channels=3, dim=96, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=1, multiple_of=32,
    ffn_dim_multiplier=1.0, qk_norm=True, cap_feat_dim=64, axes_dims=[16, 16, 16], axes_lens=[300, 512, 512],
)
PIXEL_DIT = dict(
    num_groups=2, hidden_size=96, pixel_hidden_size=8, pixel_attn_hidden_size=64, pixel_num_groups=2, patch_depth=2,
    pixel_depth=1, txt_embed_dim=64,
)

VARIANTS: dict[str, Variant] = {
    "wan_camera": Variant(
        "wan.model:CameraWanModel", dict(in_dim_control_adapter=2, **WAN),
        latent=WAN_LATENT, context=WAN_CONTEXT, randoms=dict(camera_conditions=(1, 2, 3, 64, 64), **CLIP)),
    "wan_s2v": Variant(
        "wan.model:WanModel_S2V", dict(audio_dim=16, audio_inject_layers=[0], **WAN),
        latent=WAN_LATENT, context=WAN_CONTEXT),
    "wan_humo": Variant(
        "wan.model:HumoWanModel", dict(**WAN),
        latent=WAN_LATENT, context=WAN_CONTEXT, randoms=dict(audio_embed=(1, 3, 8, 5, 1280))),
    "wan_scail2": Variant(
        "wan.model:SCAIL2WanModel", dict(in_dim=16, **WAN),
        latent=WAN_LATENT, context=WAN_CONTEXT, randoms=CLIP),
    "wan_animate": Variant(
        "wan.model_animate:AnimateWanModel", dict(**WAN), latent=WAN_LATENT, context=WAN_CONTEXT, randoms=CLIP),
    "wan_dancer": Variant(
        "wan.model_wandancer:WanDancerModel", dict(audio_inject_layers=[0], **WAN),
        latent=WAN_LATENT, context=WAN_CONTEXT, randoms=CLIP),
    "lumina_pixels": Variant(
        "lumina.model:NextDiTPixelSpace", dict(decoder_hidden_size=16, decoder_num_res_blocks=1, **NEXT_DIT),
        latent=(1, 3, 32, 48), context=(1, 10, 64), constants=dict(num_tokens=10)),
    "pid": Variant(
        "pixeldit.pid:PidNet", dict(lq_latent_channels=4, lq_hidden_dim=16, lq_num_res_blocks=1, **PIXEL_DIT),
        latent=(1, 3, 64, 96), context=(1, 10, 64), randoms=dict(lq_latent=(1, 4, 8, 12)),
        constants=dict(degrade_sigma=torch.tensor([0.1]))),
    "triposplat": Variant(
        "triposplat.model:LatentSeqMMFlowModel",
        dict(q_token_length=48, in_channels=8, model_channels=128, cond_channels=64, out_channels=8, num_blocks=2,
             num_refiner_blocks=1, cond2_channels=None),
        latent=[(1, 48, 8), (1, 1, 5)], context=(1, 10, 64)),
    "minimax": Variant(
        "minimax.model:MiniMaxH3Model",
        dict(hidden_size=128, num_layers=2, token_refiner_num_layers=1, num_attention_heads=1, ffn_hidden_size=128,
             text_dim=64, time_embed_hidden_size=64, time_embed_dim=64),
        latent=[(1, 24, 3, 8, 8), (1, 32, 2, 6)], context=(1, 10, 64)),
    "hunyuan_dit": Variant(
        "hydit.models:HunYuanDiT",
        dict(hidden_size=128, depth=4, num_heads=2, text_states_dim=64, text_states_dim_t5=48, text_len=6, text_len_t5=4),
        latent=(1, 4, 8, 12), context=(1, 6, 64), randoms=dict(encoder_hidden_states_t5=(1, 4, 48)),
        ones=dict(text_embedding_mask=(1, 6), text_embedding_mask_t5=(1, 4))),
    "hunyuan3d21": Variant(
        "hunyuan3dv2_1.hunyuandit:HunYuanDiTPlain",
        dict(in_channels=8, hidden_size=128, context_dim=64, depth=3, num_heads=2, num_moe_layers=0,
             guidance_cond_proj_dim=None),
        latent=(1, 8, 48), context=(1, 10, 64)),
    "stable_audio": Variant(
        "audio.dit:AudioDiffusionTransformer",
        dict(io_channels=8, embed_dim=64, cond_token_dim=64, global_cond_dim=64, depth=2, num_heads=1),
        latent=(1, 8, 48), context=(1, 10, 64), randoms=dict(global_embed=(1, 64))),
}
# fmt: on


def module(variant: Variant, seed: int = 0) -> torch.nn.Module:
    """The bare diffusion model on the CPU in fp32, with weights as tiny_models makes them."""
    model = construct(variant)
    model.load_state_dict(state_dict(variant, seed, torch.float32))
    return model.eval().requires_grad_(False)


def call(model: torch.nn.Module, variant: Variant, options: dict[str, Any], seed: int = 7) -> torch.Tensor:
    """One evaluation at sigma 0.7 from seeded noise, with these transformer_options: the image part of its output."""
    generator = torch.Generator().manual_seed(seed)
    noise = lambda shape: torch.randn(shape, generator=generator)  # noqa: E731
    x = [noise(s) for s in variant.latent] if isinstance(variant.latent, list) else noise(variant.latent)
    arguments = {k: noise(shape) for k, shape in variant.randoms.items()}
    arguments |= {k: torch.ones(shape, dtype=torch.long) for k, shape in variant.ones.items()}
    arguments |= variant.constants
    context = noise(variant.context)
    out = model(x, torch.tensor([0.7]), context=context, transformer_options=options, **arguments)
    return out if isinstance(out, torch.Tensor) else out[0]
