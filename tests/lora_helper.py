"""LoRA files for tiny models, in the key layouts that are met, in a folder of the test's own."""

import pytest
import safetensors.torch
import torch
from nodes_helper import model_of, run_node

import comfy.lora  # isort: skip
import comfy.sd  # isort: skip
import folder_paths  # isort: skip

from tessera.nodes.control.balanced_lora_stack import BalancedLoraStack

PLACES = {  # what each layout calls a layer of that tiny model: qkv in one, or q, k and v apart
    ("flux", "core"): ["diffusion_model.double_blocks.0.img_attn.qkv", "diffusion_model.single_blocks.1.linear1"],
    ("flux", "kohya"): ["lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_1_linear1"],
    ("flux", "diffusers"): [
        "transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_v",
        "transformer.single_transformer_blocks.1.attn.to_k", "transformer.single_transformer_blocks.1.proj_mlp",
    ],
    ("wan", "core"): ["diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.1.ffn.0"],
    ("wan", "kohya"): ["lora_unet_blocks_0_self_attn_q", "lora_unet_blocks_1_ffn_0"],
    ("sd3", "core"): ["diffusion_model.joint_blocks.0.x_block.attn.qkv", "diffusion_model.joint_blocks.1.x_block.mlp.fc1"],
    ("sd3", "kohya"): ["lora_unet_joint_blocks_0_x_block_attn_qkv", "lora_unet_joint_blocks_1_x_block_mlp_fc1"],
    ("sd3", "diffusers"): [
        "transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_k",
        "transformer.transformer_blocks.1.ff.net.0.proj",
    ],
}  # fmt: skip
PARTS = {
    "core": ("lora_B.weight", "lora_A.weight"),
    "kohya": ("lora_up.weight", "lora_down.weight"),
    "diffusers": ("lora_B.weight", "lora_A.weight"),
}


def target(model, place: str):
    """(tensor, shape) of what core adds that layer's LoRA to."""
    key = comfy.lora.model_lora_keys_unet(model.model, {})[place]
    tensor = key if isinstance(key, str) else key[0]
    shape = [*model.get_model_object(tensor).shape]
    if not isinstance(key, str) and key[1] is not None:
        shape[key[1][0]] = key[1][2]
    return tensor, shape


def tensors(name: str, layout: str, seed: int = 0, rank: int = 3, size: float = 1.0, places=None):
    model = model_of(name)[0]
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for place in places or PLACES[name, layout]:
        rows, columns = target(model, place)[1][:2]
        up, down = PARTS[layout]
        made[f"{place}.{up}"] = size * torch.randn(rows, rank, generator=generator) / rank**0.5
        made[f"{place}.{down}"] = torch.randn(rank, columns, generator=generator) / columns**0.5
        if layout == "kohya":
            made[f"{place}.alpha"] = torch.tensor(float(rank + 1))
    return made


@pytest.fixture
def loras(tmp_path, monkeypatch):
    """models/loras of this test; writes a file of tensors there."""
    known = dict(folder_paths.folder_names_and_paths)
    known["loras"] = ([str(tmp_path)], {".safetensors"})
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})

    def write(name: str, held) -> str:
        safetensors.torch.save_file({k: v.contiguous() for k, v in held.items()}, str(tmp_path / name))
        return name

    return write


def added(model, patched) -> dict[str, torch.Tensor]:
    """What the patches of a MODEL add to each tensor, fp64, by core's own sum."""
    made = {}
    for key, patches in patched.patches.items():
        zero = torch.zeros(model.get_model_object(key).shape, dtype=torch.float64)
        made[key] = comfy.lora.calculate_weight(patches, zero, key, intermediate_dtype=torch.float64)
    return made


def core(model, held, strengths):
    """Load LoRA, chained."""
    for one, strength in zip(held, strengths, strict=True):
        model = comfy.sd.load_lora_for_models(model, None, one, strength, 0)[0]
    return model


def stack(model, names, **inputs):
    return run_node(BalancedLoraStack, model=model, **names, **inputs)
