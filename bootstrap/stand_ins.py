"""Tiny files under the names of official weights, in their formats: templates that need those run on these in tests.
The pictures are noise; what is loaded, patched, sampled, decoded and reported is real."""

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import safetensors.torch
import tiny_vae
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from pack import ROOT, use_comfyui
from tiny_models import state_dict
from tiny_specs import SPECS, Spec

use_comfyui()

import comfy.ops
import comfy.utils
from comfy.ldm.flux.controlnet import ControlNetFlux
from comfy.taesd.taesd import TAESD

FLUX, SD3 = SPECS["flux"], SPECS["sd3"]
SD15 = Spec(  # what tells Stable Diffusion 1.5 from others is its width, so two levels of one block each keep it small
    "modules.diffusionmodules.openaimodel:UNetModel",
    dict(image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[1, 1], channel_mult=[1, 1],
         num_heads=8, transformer_depth=[1, 1], transformer_depth_output=[1] * 4, transformer_depth_middle=1,
         context_dim=768, use_spatial_transformer=True, legacy=False, adm_in_channels=None,
         use_linear_in_transformer=False),
    latent=(1, 4, 8, 8), context=(1, 6, 768), direct="SD15",
)  # fmt: skip
ATTENTIONS = ["down_blocks.0.attentions.0", "down_blocks.1.attentions.0", "mid_block.attentions.0",
              "up_blocks.0.attentions.0", "up_blocks.0.attentions.1", "up_blocks.1.attentions.0",
              "up_blocks.1.attentions.1"]  # fmt: skip
Tensors = dict[str, torch.Tensor]
PIXART, DIT = "PixArt-Sigma-XL-2-1024-MS", "DiT-XL-2-256"
OLD = {"_class_name": "Transformer2DModel", "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "patch_size": 2,
       "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 1000, "activation_fn": "gelu-approximate",
       "attention_bias": True, "norm_elementwise_affine": False, "num_vector_embeds": None}  # fmt: skip
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
         "prediction_type": "epsilon"}  # fmt: skip
VAE = {"_class_name": "AutoencoderKL", "latent_channels": 4}
DYNAMICTRL = "DynamiCtrl/transformer"
SANA, LONG_SANA = "SANA-Video_2B_480p_diffusers", "SANA-Video_2B_480p_LongLive_diffusers"
SANA_SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "num_cross_attention_heads": 2,
              "cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 96, "in_channels": 16, "out_channels": 16,
              "mlp_ratio": 3.0, "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads"}  # fmt: skip
SANA_FLOW = {
    "_class_name": "DPMSolverMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 8.0,
}
CONFIGS: dict[str, dict[str, Any]] = {  # as the releases name class and entries, in small sizes
    f"{PIXART}/transformer/config.json": {
        **OLD, "norm_type": "ada_norm_single", "sample_size": 128, "cross_attention_dim": 32, "caption_channels": 96,
        "interpolation_scale": 2, "use_additional_conditions": False,
    },
    f"{PIXART}/scheduler/scheduler_config.json": {"_class_name": "DPMSolverMultistepScheduler", **BETAS},
    f"{PIXART}/vae/config.json": {**VAE, "scaling_factor": 0.13025},
    f"{DIT}/transformer/config.json": {**OLD, "norm_type": "ada_norm_zero", "sample_size": 32, "cross_attention_dim": None},
    f"{DIT}/scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler", **BETAS},
    f"{DIT}/vae/config.json": {**VAE, "scaling_factor": 0.18215},
    f"{SANA}/transformer/config.json": {"_class_name": "SanaVideoTransformer3DModel", **SANA_SIZES},
    f"{SANA}/scheduler/scheduler_config.json": SANA_FLOW,
    f"{LONG_SANA}/transformer/config.json": {"_class_name": "SanaVideoCausalTransformer3DModel", **SANA_SIZES},
    f"{LONG_SANA}/scheduler/scheduler_config.json": SANA_FLOW,
    f"{DYNAMICTRL}/config.json": {"_class_name": "DynamiCtrlTransformerModel", "sample_height": 60, "sample_width": 90},
}  # fmt: skip


def random(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    generator = torch.Generator().manual_seed(3)
    return {k: (torch.randn(s, generator=generator) / s[-1] ** 0.5).bfloat16() for k, s in shapes.items()}


def taesd(channels: int, prefix: str = "") -> Tensors:
    """Core's smallest VAE, which Load VAE and checkpoints take as well; its decoder ends in mid grey, not below black."""
    weights = {k: v.detach().contiguous() for k, v in TAESD(latent_channels=channels).state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    for key, value in weights.items():
        if value.ndim == 4:
            weights[key] = torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5
        elif key.endswith(".bias"):
            weights[key] = torch.zeros_like(value)
    last = [key for key in weights if key.startswith("taesd_decoder") and key.endswith(".bias")][-1]
    weights[last] = torch.full_like(weights[last], 0.5)
    return {prefix + key: value for key, value in weights.items()}


def sd15() -> Tensors:
    unet = {f"model.diffusion_model.{k}": v for k, v in state_dict(SD15).items()}
    return unet | taesd(4, "first_stage_model.")


def sd3() -> Tensors:
    """As checkpoints of Stable Diffusion 3.5 have it, without text encoders."""
    return {f"model.diffusion_model.{k}": v for k, v in state_dict(SD3).items()} | taesd(16, "first_stage_model.")


def dit4sr(module: Any) -> Tensors:
    """Control tensors alone. module: the pack's methods.control.dit4sr."""
    depth, dual = SD3.arguments["depth"], frozenset(SD3.arguments["x_block_self_attn_layers"])
    return random(module.control_keys(module.Sizes(depth, dual, 64 * depth)))


def pixart() -> Tensors:
    """PixArt-alpha of its own width, which its detection fixes, and of as few blocks as RelaCtrl stands between. They pass
    on what they get, in fp8: half a gigabyte."""
    spec = SPECS["pixart"]
    spec = replace(spec, arguments=dict(spec.arguments, depth=1, micro_condition=True))
    made = state_dict(spec)
    first = {key: value for key, value in made.items() if key.startswith("blocks.0.")}
    for i, (key, value) in product(range(21), first.items()):
        made[key.replace("blocks.0.", f"blocks.{i}.")] = torch.zeros(value.shape, dtype=torch.float8_e4m3fn)
    return made


def relactrl(module: Any) -> Tensors:
    """Control tensors alone. module: the pack's methods.control.relactrl_keys."""
    return random(module.expected(1152, (6, 2, 6, 4, 2, 2, 4, 4, 6, 6, 6)))


def instantx(blocks: int = 3) -> Tensors:
    """A ControlNet of FLUX's double blocks under diffusers' names, as InstantX and Shakker-Labs release them."""
    sizes = {**FLUX.arguments, "depth": blocks, "depth_single_blocks": 0}
    net = ControlNetFlux(
        latent_input=True, operations=comfy.ops.disable_weight_init, dtype=torch.bfloat16, device="meta", **sizes
    )
    own = random({key: tuple(value.shape) for key, value in net.state_dict().items()})
    made = {key: value for key, value in own.items() if key.startswith("controlnet_blocks")}
    for key, place in comfy.utils.flux_to_diffusers(sizes).items():
        target, *part = (place,) if isinstance(place, str) else place
        if target in own:
            made[key] = (own[target].narrow(*part[0]) if part and part[0] is not None else own[target]).clone()
    return made


def clear(module: Any, down: int = 4) -> Tensors:
    """module: the pack's methods.attention.clear_weights."""
    sizes = [FLUX.arguments[name] for name in ("depth", "depth_single_blocks", "hidden_size")]
    shapes = module.expected(*sizes)
    for path, count in zip((module.DOUBLE, module.SINGLE), sizes, strict=False):
        shapes |= {f"{path}.{i}.{module.PATCH_WEIGHT}": (1, 1, 1, down, 1, down, 1) for i in range(count)}
    return random(shapes)


def easycontrol(module: Any, rank: int = 4) -> Tensors:
    """module: the pack's methods.control.easycontrol."""
    return random(module.expected(*(FLUX.arguments[n] for n in ("depth", "depth_single_blocks", "hidden_size")), rank))


def lora(seed: int, rank: int = 4) -> Tensors:
    """Of every matrix in FLUX's blocks, in kohya's layout."""
    made, generator = {}, torch.Generator().manual_seed(seed)
    for key, value in state_dict(FLUX).items():
        if "blocks." in key and value.ndim == 2:
            name, (rows, columns) = "lora_unet_" + key.removesuffix(".weight").replace(".", "_"), value.shape
            made[f"{name}.lora_up.weight"] = 0.1 * torch.randn(rows, rank, generator=generator)
            made[f"{name}.lora_down.weight"] = torch.randn(rank, columns, generator=generator) / columns**0.5
    return made


def linfusion(module: Any, folder: Path) -> Tensors:
    """Also writes its config.json into the folder. module: the pack's methods.attention.linfusion."""
    entries = [{"module_name": f"{name}.transformer_blocks.0.attn1", "dim_n": 320, "heads": 8, "projection_mid_dim": None}
               for name in ATTENTIONS]  # fmt: skip
    config = json.dumps({"_class_name": "LinFusion", "modules_list": entries})
    (folder / "config.json").write_text(config)
    modules = module.modules_of(config)
    return random({f"{i}.{key}": shape for i, m in enumerate(modules) for key, shape in m.shapes().items()})


def bridged(name: str, kind: str) -> Tensors:
    """Of a pipeline's folder; kind: the class of diffusers that now takes the config, without the entries it dropped."""
    import diffusers

    made = getattr(diffusers, kind)
    known = inspect.signature(made).parameters
    weights = made(**{k: v for k, v in CONFIGS[f"{name}/transformer/config.json"].items() if k in known}).state_dict()
    return random({key: tuple(value.shape) for key, value in weights.items()})


def sana_video(networks: str, name: str) -> Tensors:
    """networks: the pack's package of that name."""
    from importlib import import_module

    told = CONFIGS[f"{name}/transformer/config.json"]
    heads, head = told["num_attention_heads"], told["attention_head_dim"]
    hidden = int(told["mlp_ratio"] * heads * head)
    sizes = import_module(f"{networks}.sana_layers").Sizes(
        16, heads, head, told["num_layers"], heads, told["caption_channels"], hidden
    )
    weights = import_module(f"{networks}.sana_video").SanaVideo(sizes).state_dict()
    return random({key: tuple(value.shape) for key, value in weights.items()})


def pickled(tensors: Tensors, path: Path) -> None:
    """A checkpoint of torch.save, and beside it what the command makes of it that users are told."""
    torch.save(tensors, path)
    command = [sys.executable, "-m", "scripts.convert_checkpoint", str(path), str(path.with_suffix(".safetensors"))]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def dynamictrl(module: Any) -> Tensors:
    """module: the pack's methods.control.dynamictrl."""
    return random(module.expected(module.Sizes(dim=128, time=64, layers=2, text=96, joined=False)))


def video_vae() -> Tensors:
    """Core's smallest VAE that joins frames by fours."""
    from comfy.ldm.wan.vae import WanVAE

    made = WanVAE(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])
    shapes = {key: tuple(value.shape) for key, value in made.state_dict().items()}
    weights = random({key: shape for key, shape in shapes.items() if not key.endswith(("gamma", "bias"))})
    return {key: weights.get(key, torch.full(shape, float(key.endswith("gamma")))) for key, shape in shapes.items()}


def gguf_file(tensors: Tensors, path: Path) -> None:
    """As ComfyUI-GGUF's converter writes FLUX: matrices in Q8_0, the rest in F32."""
    writer = GGUFWriter(str(path), "flux")
    for name, tensor in tensors.items():
        array = tensor.float().numpy()
        fits = array.ndim == 2 and array.shape[1] % 32 == 0 and "_in." not in name
        kind = GGMLQuantizationType.Q8_0 if fits else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(needs: list[dict[str, str]], models: Path, pack: Any) -> None:
    """Every file of these needs below a models folder; text encoders only by name. KeyError for one that has no
    stand-in. pack: the package object."""
    from importlib import import_module

    methods, control = (f"{pack.__name__}.methods.{folder}" for folder in ("attention", "control"))
    makers: dict[str, Callable[[Path], Tensors]] = {
        "flux1-dev.safetensors": lambda _: state_dict(FLUX),
        "ae.safetensors": lambda _: taesd(16),
        "clip_l.safetensors": lambda _: {},
        "t5xxl_fp16.safetensors": lambda _: {},
        "v1-5-pruned-emaonly.safetensors": lambda _: sd15(),
        "sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors": lambda _: sd3(),
        "dit4sr_q/diffusion_pytorch_model.safetensors": lambda _: dit4sr(import_module(f"{control}.dit4sr")),
        "clear_local_16_down_4.safetensors": lambda _: clear(import_module(f"{methods}.clear_weights")),
        "PixArt-XL-2-1024-MS/diffusion_pytorch_model.safetensors": lambda _: pixart(),
        "RelaCtrl/relactrl_pixart_canny_1024.pth": lambda _: relactrl(import_module(f"{control}.relactrl_keys")),
        "FLUX.1-dev-ControlNet-Union-Pro-2.0/diffusion_pytorch_model.safetensors": lambda _: instantx(),
        "canny.safetensors": lambda _: easycontrol(import_module(f"{pack.__name__}.methods.control.easycontrol")),
        "art_lora_comfy_converted.safetensors": lambda _: lora(1),
        "realism_lora_comfy_converted.safetensors": lambda _: lora(2),
        "hunyuan_video_t2v_720p_bf16.safetensors": lambda _: state_dict(SPECS["hunyuan_video"]),
        "llava_llama3_fp8_scaled.safetensors": lambda _: {},
        "hunyuan_video_vae_bf16.safetensors": lambda _: taesd(16),
        f"{DYNAMICTRL}/diffusion_pytorch_model.safetensors": lambda _: dynamictrl(
            import_module(f"{control}.dynamictrl")
        ),
        "CogVideoX/diffusion_pytorch_model.safetensors": lambda _: video_vae(),
        "LinFusion-1-5/diffusion_pytorch_model.safetensors": lambda folder: linfusion(
            import_module(f"{methods}.linfusion"), folder
        ),
        f"{PIXART}/transformer/diffusion_pytorch_model.safetensors": lambda _: bridged(
            PIXART, "PixArtTransformer2DModel"
        ),
        "sdxl_vae.safetensors": lambda _: taesd(4),
        **{
            f"{name}/transformer/diffusion_pytorch_model.safetensors": lambda _, name=name: sana_video(
                f"{pack.__name__}.networks", name
            )
            for name in (SANA, LONG_SANA)
        },
        "gemma_2_2b_fp16.safetensors": lambda _: {},
        "wan_2.1_vae.safetensors": lambda _: video_vae(),
        "ltxv-2b-0.9.8-distilled.safetensors": lambda _: tiny_vae.checkpoint(),
        f"{DIT}/transformer/diffusion_pytorch_model.bin": lambda _: bridged(DIT, "DiTTransformer2DModel"),
        "vae-ft-mse-840000-ema-pruned.safetensors": lambda _: taesd(4),
    }
    for weight in needs:
        path = models / weight["directory"] / weight["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".gguf":
            gguf_file(state_dict(FLUX), path)
        elif path.suffix == ".json":
            path.write_text(json.dumps(CONFIGS[weight["name"]]))
        elif path.suffix in (".bin", ".pth"):
            pickled(makers[weight["name"]](path.parent), path)
        else:
            safetensors.torch.save_file(makers[weight["name"]](path.parent), str(path), tiny_vae.sizes_of(path.name))
