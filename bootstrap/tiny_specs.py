"""One tiny configuration for each of 35 DiT variants: constructor arguments, latent and conditioning shapes.

Those without `direct` are small enough for model detection: written to a file, the stock loader rebuilds them.
Detection fixes the width of the others, so they are built from their class in comfy.supported_models."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Spec:
    """What to build and what to feed it. Shapes include the batch of 1."""

    model: str  # "module:Class" below comfy.ldm
    arguments: Mapping[str, Any]  # of the constructor
    latent: Shape | list[Shape]  # [1, C, (T,) H, W]; a list for video and audio
    context: Shape  # text features [1, L, C]
    pooled: Shape | None = None
    metadata: Mapping[str, Any] | None = None  # "transformer" part of the file's config, which some detectors read
    direct: str | None = None  # class in comfy.supported_models for a model that detection cannot size
    ones: Mapping[str, Shape] = field(default_factory=dict)  # integer conditioning, e.g. masks
    randoms: Mapping[str, Shape] = field(default_factory=dict)  # further float conditioning


# fmt: off

LTXAV = dict(
    attention_head_dim=16, num_attention_heads=4, cross_attention_dim=64, caption_channels=48,
    audio_in_channels=128, audio_cross_attention_dim=32, audio_attention_head_dim=8, audio_num_attention_heads=4,
    connector_attention_head_dim=8, connector_num_attention_heads=4, connector_num_layers=1,
)
SPECS: dict[str, Spec] = {
    "wan": Spec(
        "wan.model:WanModel",
        dict(model_type="t2v", dim=128, ffn_dim=256, num_heads=1, num_layers=2),
        latent=(1, 16, 3, 8, 8), context=(1, 12, 4096)),
    "wan_meta": Spec(
        "wan.model:WanModel",
        dict(model_type="t2v", dim=96, ffn_dim=128, num_heads=4, num_layers=3, text_dim=64),
        latent=(1, 16, 5, 8, 12), context=(1, 12, 64), metadata=dict(num_heads=4, text_dim=64)),
    "wan_ar": Spec(
        "wan.ar_model:CausalWanModel",
        dict(model_type="t2v", dim=96, ffn_dim=128, num_heads=4, num_layers=2, text_dim=64),
        latent=(1, 16, 4, 8, 8), context=(1, 12, 64), metadata=dict(num_heads=4, text_dim=64, causal_ar=True)),
    "wan_i2v": Spec(
        "wan.model:WanModel",
        dict(model_type="i2v", in_dim=36, dim=128, ffn_dim=128, num_heads=1, num_layers=2),
        latent=(1, 16, 3, 8, 8), context=(1, 12, 4096)),
    "wan_vace": Spec(
        "wan.model:VaceWanModel",
        dict(model_type="vace", dim=128, ffn_dim=128, num_heads=1, num_layers=2, vace_layers=1, vace_in_dim=96),
        latent=(1, 16, 3, 8, 8), context=(1, 12, 4096)),
    "flux": Spec(
        "flux.model:Flux",
        dict(
            in_channels=16, out_channels=16, vec_in_dim=64, context_in_dim=96, hidden_size=128, mlp_ratio=4.0,
            num_heads=1, depth=2, depth_single_blocks=2, axes_dim=[16, 56, 56], theta=10000, patch_size=2,
            qkv_bias=True, guidance_embed=True, txt_ids_dims=[]),
        latent=(1, 16, 8, 12), context=(1, 10, 96), pooled=(1, 64)),
    "flux2": Spec(
        "flux.model:Flux",
        dict(
            in_channels=128, out_channels=128, vec_in_dim=None, context_in_dim=96, hidden_size=128, mlp_ratio=3.0,
            num_heads=1, depth=1, depth_single_blocks=2, axes_dim=[32, 32, 32, 32], theta=2000, patch_size=1,
            qkv_bias=False, guidance_embed=True, txt_ids_dims=[3], global_modulation=True, mlp_silu_act=True,
            ops_bias=False, default_ref_method="index", ref_index_scale=10.0),
        latent=(1, 128, 4, 6), context=(1, 10, 96)),
    "sd3": Spec(
        "modules.diffusionmodules.mmdit:OpenAISignatureMMDITWrapper",
        dict(
            input_size=None, in_channels=16, out_channels=16, patch_size=2, depth=2, adm_in_channels=64,
            context_embedder_config=dict(target="torch.nn.Linear", params=dict(in_features=96, out_features=128)),
            num_patches=256, pos_embed_max_size=16, pos_embed_scaling_factor=None, qk_norm="rms",
            x_block_self_attn_layers=[0]),
        latent=(1, 16, 8, 12), context=(1, 10, 96), pooled=(1, 64)),
    "ltxv": Spec(
        "lightricks.model:LTXVModel",
        dict(in_channels=128, cross_attention_dim=256, attention_head_dim=8, num_attention_heads=32, num_layers=2),
        latent=(1, 128, 3, 4, 6), context=(1, 10, 4096), ones=dict(attention_mask=(1, 10))),
    "ltxv_meta": Spec(
        "lightricks.model:LTXVModel",
        dict(
            in_channels=128, cross_attention_dim=64, attention_head_dim=16, num_attention_heads=4, num_layers=2,
            caption_channels=48),
        latent=(1, 128, 3, 4, 6), context=(1, 10, 48),
        metadata=dict(attention_head_dim=16, num_attention_heads=4, cross_attention_dim=64, caption_channels=48),
        ones=dict(attention_mask=(1, 10))),
    "hunyuan_video": Spec(
        "hunyuan_video.model:HunyuanVideo",
        dict(
            in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=96, hidden_size=128, mlp_ratio=4.0,
            num_heads=1, depth=2, depth_single_blocks=2, axes_dim=[16, 56, 56], theta=256, patch_size=[1, 2, 2],
            qkv_bias=True, guidance_embed=True, byt5=False, meanflow=False, use_cond_type_embedding=False,
            vision_in_dim=None, meanflow_sum=False),
        latent=(1, 16, 3, 8, 8), context=(1, 10, 96), pooled=(1, 768)),
    "pixart": Spec(
        "pixart.pixartms:PixArtMS",
        dict(
            num_heads=16, patch_size=2, hidden_size=1152, in_channels=4, depth=1, model_max_length=16,
            micro_condition=False),
        latent=(1, 4, 32, 40), context=(1, 10, 4096)),
    "cosmos_predict2": Spec(
        "cosmos.predict2:MiniTrainDIT",
        dict(
            max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16, patch_spatial=2,
            patch_temporal=1, model_channels=192, concat_padding_mask=True, crossattn_emb_channels=1024,
            pos_emb_cls="rope3d", pos_emb_learnable=True, use_adaln_lora=True, adaln_lora_dim=256,
            extra_per_block_abs_pos_emb=False, rope_enable_fps_modulation=False),
        latent=(1, 16, 2, 8, 8), context=(1, 10, 1024)),
    "kandinsky5": Spec(
        "kandinsky5.model:Kandinsky5",
        dict(model_dim=128, time_dim=64, ff_dim=128, visual_embed_dim=132, num_text_blocks=1, num_visual_blocks=2),
        latent=(1, 16, 2, 8, 8), context=(1, 10, 3584), pooled=(1, 768)),
    "cogvideox": Spec(
        "cogvideo.model:CogVideoXTransformer3DModel",
        dict(
            num_attention_heads=2, attention_head_dim=64, time_embed_dim=64, num_layers=2, in_channels=16,
            patch_size=2, text_embed_dim=96, use_rotary_positional_embeddings=True),
        latent=(1, 16, 3, 8, 8), context=(1, 10, 96)),
    "krea2": Spec(
        "krea2.model:SingleStreamDiT",
        dict(features=128, channels=16, patch=2, layers=2, heads=1, kvheads=1, txtlayers=2, txtdim=160),
        latent=(1, 16, 1, 8, 12), context=(1, 10, 320)),
    "lens": Spec(
        "lens.model:LensTransformer2DModel",
        dict(
            in_channels=128, out_channels=32, num_layers=2, num_attention_heads=2, enc_hidden_dim=48,
            multi_layer_encoder_feature=True, selected_layer_index=(0, 1)),
        latent=(1, 128, 4, 6), context=(1, 10, 96)),
    "hunyuan3d2": Spec(
        "hunyuan3d.model:Hunyuan3Dv2",
        dict(
            in_channels=64, context_in_dim=96, hidden_size=128, mlp_ratio=4.0, num_heads=16, depth=2,
            depth_single_blocks=2, qkv_bias=True, guidance_embed=False),
        latent=(1, 64, 48), context=(1, 10, 96)),
    "joyimage": Spec(
        "joyimage.model:JoyImageTransformer3DModel",
        dict(
            in_channels=16, hidden_size=128, patch_size=[1, 2, 2], num_layers=2, num_attention_heads=1, text_dim=4096),
        latent=(1, 16, 1, 8, 12), context=(1, 10, 4096)),
    "ltxav_meta": Spec(
        "lightricks.av_model:LTXAVModel",
        dict(in_channels=128, num_layers=2, **LTXAV),
        latent=[(1, 128, 3, 4, 6), (1, 8, 12, 16)], context=(1, 10, 96), metadata=LTXAV,
        ones=dict(attention_mask=(1, 10))),
    "chroma": Spec(
        "chroma.model:Chroma",
        dict(
            in_channels=64, out_channels=64, context_in_dim=96, hidden_size=128, mlp_ratio=4.0, num_heads=1, depth=2,
            depth_single_blocks=2, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, in_dim=64,
            out_dim=128, hidden_dim=64, n_layers=1, txt_ids_dims=[], vec_in_dim=None),
        latent=(1, 16, 8, 12), context=(1, 10, 96), direct="Chroma"),
    "chroma_radiance": Spec(
        "chroma_radiance.model:ChromaRadiance",
        dict(
            in_channels=3, out_channels=3, context_in_dim=96, hidden_size=128, mlp_ratio=4.0, num_heads=1, depth=1,
            depth_single_blocks=2, axes_dim=[16, 56, 56], theta=10000, patch_size=16, qkv_bias=True, in_dim=64,
            out_dim=128, hidden_dim=64, n_layers=1, txt_ids_dims=[], vec_in_dim=None, nerf_hidden_size=16,
            nerf_mlp_ratio=2, nerf_depth=1, nerf_max_freqs=8, nerf_tile_size=512, nerf_final_head_type="conv",
            nerf_embedder_dtype=None, use_x0=False, use_sequential_txt_ids=False),
        latent=(1, 3, 64, 96), context=(1, 10, 96), direct="ChromaRadiance"),
    "qwen_image": Spec(
        "qwen_image.model:QwenImageTransformer2DModel",
        dict(
            in_channels=64, out_channels=16, num_layers=2, attention_head_dim=128, num_attention_heads=1,
            joint_attention_dim=96),
        latent=(1, 16, 1, 8, 12), context=(1, 10, 96), direct="QwenImage"),
    "lumina2": Spec(
        "lumina.model:NextDiT",
        dict(
            patch_size=2, in_channels=16, dim=96, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=1,
            multiple_of=32, ffn_dim_multiplier=1.0, qk_norm=True, cap_feat_dim=64, axes_dims=[16, 16, 16],
            axes_lens=[300, 512, 512]),
        latent=(1, 16, 8, 12), context=(1, 10, 64), direct="Lumina2"),
    "z_image": Spec(
        "lumina.model:NextDiT",
        dict(
            patch_size=2, in_channels=16, dim=256, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
            multiple_of=32, ffn_dim_multiplier=1.0, qk_norm=True, cap_feat_dim=64, axes_dims=[32, 48, 48],
            axes_lens=[300, 512, 512], z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32),
        latent=(1, 16, 8, 12), context=(1, 10, 64), direct="ZImage"),
    "aura": Spec(
        "aura.mmdit:MMDiT",
        dict(max_seq=256, cond_seq_dim=96, n_double_layers=1, n_layers=3, dim=128, n_heads=2, global_conddim=128),
        latent=(1, 4, 8, 12), context=(1, 10, 96), direct="AuraFlow"),
    "hidream": Spec(
        "hidream.model:HiDreamImageTransformer2DModel",
        dict(
            patch_size=2, in_channels=16, out_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=128,
            num_attention_heads=1, caption_channels=[96, 64], text_emb_dim=64, num_routed_experts=2,
            num_activated_experts=1, axes_dims_rope=[64, 32, 32], max_resolution=[32, 32], llama_layers=[0, 1, 1, 1]),
        latent=(1, 16, 8, 12), context=(1, 10, 96), pooled=(1, 64), direct="HiDream",
        randoms=dict(conditioning_llama3=(1, 2, 7, 64))),
    "omnigen2": Spec(
        "omnigen.omnigen2:OmniGen2Transformer2DModel",
        dict(
            hidden_size=96, num_layers=2, num_refiner_layers=1, num_attention_heads=4, num_kv_heads=2, multiple_of=32,
            axes_dim_rope=[8, 8, 8], axes_lens=[300, 512, 512], text_feat_dim=64),
        latent=(1, 16, 8, 12), context=(1, 10, 64), direct="Omnigen2", ones=dict(attention_mask=(1, 10))),
    "boogu": Spec(
        "boogu.model:BooguTransformer2DModel",
        dict(
            hidden_size=96, num_layers=2, num_double_stream_layers=1, num_refiner_layers=1, num_attention_heads=4,
            num_kv_heads=2, multiple_of=32, axes_dim_rope=[8, 8, 8], axes_lens=[300, 512, 512],
            instruction_feat_dim=64),
        latent=(1, 16, 8, 12), context=(1, 10, 64), direct="Boogu", ones=dict(attention_mask=(1, 10))),
    "mage_flow": Spec(
        "mage_flow.model:MageFlowTransformer2DModel",
        dict(num_layers=2, num_attention_heads=1, joint_attention_dim=96),
        latent=(1, 128, 4, 6), context=(1, 10, 96), direct="MageFlow"),
    "ernie": Spec(
        "ernie.model:ErnieImageModel",
        dict(hidden_size=128, num_attention_heads=1, num_layers=2, ffn_hidden_size=128, text_in_dim=96),
        latent=(1, 128, 4, 6), context=(1, 10, 96), direct="ErnieImage"),
    "pixeldit": Spec(
        "pixeldit.model:PixDiT_T2I",
        dict(
            num_groups=2, hidden_size=96, pixel_hidden_size=8, pixel_attn_hidden_size=64, pixel_num_groups=2,
            patch_depth=2, pixel_depth=1, txt_embed_dim=64),
        latent=(1, 3, 64, 96), context=(1, 10, 64), direct="PixelDiTT2I"),
    "ideogram4": Spec(
        "ideogram4.model:Ideogram4Transformer2DModel",
        dict(
            num_layers=2, num_attention_heads=1, attention_head_dim=256, intermediate_size=128, adaln_dim=64,
            llm_features_dim=96),
        latent=(1, 128, 4, 6), context=(1, 10, 96), direct="Ideogram4"),
    "mochi": Spec(
        "genmo.joint_model.asymm_models_joint:AsymmDiTJoint",
        dict(
            depth=2, patch_size=2, num_heads=2, hidden_size_x=192, hidden_size_y=96, mlp_ratio_x=64.0,
            mlp_ratio_y=4.0, learn_sigma=False, in_channels=12, qk_norm=True, qkv_bias=False, out_bias=True,
            attn_drop=0.0, patch_embed_bias=True, posenc_preserve_area=True, timestep_mlp_bias=True,
            attend_to_padding=False, timestep_scale=1000.0, use_t5=True, t5_feat_dim=96, t5_token_length=16,
            rope_theta=10000.0),
        latent=(1, 12, 2, 8, 8), context=(1, 16, 96), direct="GenmoMochi", ones=dict(attention_mask=(1, 16))),
    "cosmos": Spec(
        "cosmos.model:GeneralDIT",
        dict(
            max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16, patch_spatial=2,
            patch_temporal=1, model_channels=96, block_config="FA-CA-MLP", concat_padding_mask=True,
            pos_emb_cls="rope3d", pos_emb_learnable=False, pos_emb_interpolation="crop", block_x_format="THWBD",
            affline_emb_norm=True, use_adaln_lora=True, adaln_lora_dim=32, num_blocks=2, num_heads=4,
            extra_per_block_abs_pos_emb=True, rope_t_extrapolation_ratio=2.0,
            extra_per_block_abs_pos_emb_type="learnable"),
        latent=(1, 16, 2, 8, 8), context=(1, 10, 1024), direct="CosmosT2V"),
}

# of no loader's detection that holds at this size
HUNYUAN_DIT = Spec(
    "hydit.models:HunYuanDiT",
    {"hidden_size": 64, "depth": 4, "num_heads": 2, "text_states_dim": 48, "text_states_dim_t5": 64, "text_len": 6,
     "text_len_t5": 8},
    latent=(1, 4, 8, 12), context=(1, 6, 48), direct="HunyuanDiT1",
    ones={"attention_mask": (1, 6), "attention_mask_mt5xl": (1, 8)}, randoms={"conditioning_mt5xl": (1, 8, 64)},
)  # fmt: skip
