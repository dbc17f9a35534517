"""Quantized files of tiny models, made by the node in a folder of the test's own."""

import comfy.weight_adapter
import pytest
import torch
from nodes_helper import model_of, run_node

import folder_paths  # isort: skip

from tessera.nodes.loaders.load_quantized_model import LoadQuantizedModel
from tessera.nodes.loaders.quantize_model import QuantizeModel

LAYER = {"flux": "double_blocks.0.img_mlp.0", "wan_meta": "blocks.0.ffn.0"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """models/diffusion_models of this test."""
    known = dict(folder_paths.folder_names_and_paths)
    known["diffusion_models"] = ([str(tmp_path)], {".safetensors"})
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def quantized(name: str, format: str = "tlq4", dtype: str = "fp32", **inputs):
    """(plain model, quantized model, spec, report)."""
    model, spec = model_of(name, dtype)
    made, report = run_node(QuantizeModel, model=model, format=format, filename=name, existing="replace", **inputs)
    return model, made, spec, report


def loaded(name: str):
    folder_paths.filename_list_cache.clear()
    return run_node(LoadQuantizedModel, file=name)[0]


def lora(model, layer: str, rank: int = 4, size: float = 1.0, seed: int = 0):
    """Patches of one layer, as add_patches takes them."""
    key = f"diffusion_model.{layer}.weight"
    rows, columns = model.get_model_object(key).shape
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, columns, generator=generator) / columns**0.5
    up = size * torch.randn(rows, rank, generator=generator) / rank**0.5
    return {key: comfy.weight_adapter.LoRAAdapter(set(), (up, down, float(rank), None, None, None))}


def with_lora(model, *patches):
    patched = model.clone()
    for patch in patches:
        patched.add_patches(patch, 1.0)
    return patched
