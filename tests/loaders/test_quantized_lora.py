"""LoRA and other patches on quantized layers: what they add is what they add to dense weights, in every way of loading."""

import gc
import weakref

import pytest
import torch
from loading_helper import WIDE
from nodes_helper import Job, error, model_of
from quantized_files import FORMATS, files, opened  # noqa: F401 - a fixture
from quantized_helper import LAYER, lora, with_lora
from safetensors.torch import save_file

import comfy.hooks  # isort: skip
import comfy.lora  # isort: skip
import comfy.model_management  # isort: skip
import comfy.weight_adapter  # isort: skip
from tiny_models import conds  # isort: skip

from tessera.patching.quant_load import load
from tessera.patching.quant_ops import ours

LIMIT = {"nunchaku": 0.3}  # activations in int4: the last bit of a sum decides how all that follows is rounded
LAYERS = {"nunchaku": "single_blocks.0.linear2"}


def layer_of(kind: str) -> str:
    return LAYERS.get(kind, LAYER["flux"])


@pytest.fixture(params=FORMATS)
def kind(request):
    return request.param


@pytest.fixture
def model(files, kind):  # noqa: F811
    return opened(files, kind)


def spec_of(kind: str):
    return WIDE["flux"] if kind == "gguf" else model_of("flux")[1]


def module_of(model, layer: str):
    """The layer as sampling would meet it."""
    comfy.model_management.load_models_gpu([model])
    return model.model.diffusion_model.get_submodule(layer)


def rows(module) -> torch.Tensor:
    return torch.randn(5, module.in_features, generator=torch.Generator().manual_seed(3))


def effect(model, patches, layer: str, strengths=None) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the patches add to the layer's output, what they add to that of a dense weight), fp64."""
    module = module_of(model, layer)
    x = rows(module)
    before = module(x).double()
    dense = module.weight.to(dtype=torch.float32).dequantize()
    patched = model.clone()
    for patch, strength in zip(patches, strengths or [1.0] * len(patches), strict=True):
        patched.add_patches(patch, strength)
    key = f"diffusion_model.{layer}.weight"
    wanted = comfy.lora.calculate_weight(patched.patches[key], dense.double(), key) - dense.double()
    got = module_of(patched, layer)(x).double() - before
    module_of(model, layer)
    assert torch.equal(module(x).double(), before), "without the patch it is what it was"
    return got, x.double() @ wanted.T


@pytest.mark.parametrize("case", ["one", "tiny", "stacked", "negative"])
def test_loras(model, kind, case):
    layer = layer_of(kind)
    first, second = lora(model, layer), lora(model, layer, rank=7, size=0.3, seed=1)
    patches, strengths = {
        "one": ([first], [1.0]), "tiny": ([first], [0.01]), "stacked": ([first, second], [1.0, 0.5]),
        "negative": ([first], [-0.7]),
    }[case]  # fmt: skip
    got, want = effect(model, patches, layer, strengths)
    assert error(got, want) < 1e-3


@pytest.mark.parametrize("case", ["one", "tiny"])
def test_where_core_computes_loras_in_fp16(model, kind, case, monkeypatch):
    """As on most GPUs."""
    monkeypatch.setattr(comfy.model_management, "lora_compute_dtype", lambda device: torch.float16)
    got, want = effect(model, [lora(model, layer_of(kind))], layer_of(kind), [1.0 if case == "one" else 0.01])
    assert error(got, want) < 1e-3


def other(model, layer: str, adapter: str):
    """A LoHa or LoKr patch of higher rank than its factors have."""
    key = f"diffusion_model.{layer}.weight"
    n, k = model.get_model_object(key).shape
    g = torch.Generator().manual_seed(5)
    if adapter == "loha":
        parts = [torch.randn(n, 3, generator=g), torch.randn(3, k, generator=g) / k**0.5]
        parts += [torch.randn(n, 3, generator=g), torch.randn(3, k, generator=g) / 3]
        return {
            key: comfy.weight_adapter.LoHaAdapter(
                set(), (parts[0], parts[1], 3.0, parts[2], parts[3], None, None, None)
            )
        }
    w1 = torch.randn(8, 8, generator=g) / 8
    w2 = torch.randn(n // 8, 1, generator=g), torch.randn(1, k // 8, generator=g) / (k // 8) ** 0.5
    return {key: comfy.weight_adapter.LoKrAdapter(set(), (w1, None, 1.0, None, None, *w2, None, None))}


@pytest.mark.parametrize("adapter", ["loha", "lokr"])
def test_other_adapters(model, kind, adapter):
    got, want = effect(model, [other(model, layer_of(kind), adapter)], layer_of(kind))
    assert error(got, want) < 1e-3


def full_rank(model, layer: str):
    key = f"diffusion_model.{layer}.weight"
    generator = torch.Generator().manual_seed(6)
    return {key: ("diff", (torch.randn(model.get_model_object(key).shape, generator=generator) * 0.02,))}


def test_a_patch_of_full_rank(files, kind):  # noqa: F811
    """Makes its layer dense; refused where a dense weight cannot stand for the layer; in core's formats quantized anew."""
    model, layer = opened(files, kind), layer_of(kind)
    patch = full_rank(model, layer)
    if kind == "nunchaku":
        with pytest.raises(
            ValueError, match=r"cannot be put on a layer \[128, 640\] of nunchaku's .* LoRA of low rank"
        ):
            effect(model, [patch], layer)
        layer = "double_blocks.0.img_mlp.0"
        patch = full_rank(model, layer)
    module = module_of(model, layer)
    x, dense = rows(module), module.weight.to(dtype=torch.float32).dequantize()
    patched = with_lora(model, patch)
    wanted = (dense + patch[f"diffusion_model.{layer}.weight"][1][0]) @ x.T
    bias = 0 if module.bias is None else module.bias
    got = module_of(patched, layer)(x)
    assert error(got, wanted.T + bias) < (0.1 if kind == "fp8" else 5e-3)  # rounded to bf16, or fp8, as it is kept
    assert ours(module.weight) is None
    assert kind == "fp8" or ours(module_of(model, layer).weight) is not None


def test_biases(model, kind):
    layer = layer_of(kind)
    module = module_of(model, layer)
    x, value = rows(module), torch.linspace(-1, 1, module.out_features)
    before = module(x)
    patched = with_lora(model, {f"diffusion_model.{layer}.bias": ("diff", (value,))}, lora(model, layer))
    alone = with_lora(model, lora(model, layer))
    with_bias, without = module_of(patched, layer)(x), module_of(alone, layer)(x)
    assert error(with_bias - without, value.expand_as(without)) < 1e-5
    assert torch.equal(module_of(model, layer)(x), before)


@pytest.fixture
def low(monkeypatch):
    """Loads models with hardly any memory while it is set."""
    from comfy.model_patcher import ModelPatcher

    plain, state = ModelPatcher.load, {"low": False}

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        if state["low"]:
            lowvram_model_memory, full_load = 1, False
        return plain(self, device_to, lowvram_model_memory, force_patch_weights, full_load)

    monkeypatch.setattr(ModelPatcher, "load", load)
    return state


def sampled(model, kind):
    return Job(spec_of(kind), steps=2, cfg=1.0)(model)


def test_low_vram(model, kind, low):
    """Patched at each call instead of once; and back."""
    layer = layer_of(kind)
    plain = sampled(model, kind)
    patched = with_lora(model, lora(model, layer), lora(model, "double_blocks.0.img_attn.qkv", seed=2))
    want = sampled(patched, kind)
    module = patched.model.diffusion_model.get_submodule(layer)
    x = rows(module)
    y, limit = module(x), LIMIT.get(kind, 1e-5)
    comfy.model_management.unload_all_models()
    low["low"] = True
    got = sampled(patched, kind)
    module = patched.model.diffusion_model.get_submodule(layer)
    assert module.weight_function and module._lora[1][0].shape[0] == 4, "the LoRA's own rank"
    assert error(got, want) < limit
    assert error(module(x), y) < 1e-5
    other = with_lora(model, lora(model, layer, rank=6, seed=9))
    second = sampled(other, kind)
    assert module._lora[1][0].shape[0] == 6, "not the factors of the LoRA before"
    assert error(sampled(model, kind), plain) < limit and module._lora is None
    low["low"] = False
    comfy.model_management.unload_all_models()
    assert error(sampled(other, kind), second) < limit
    assert torch.equal(sampled(model, kind), plain)


def test_unloading_by_parts(model, kind):
    layer = layer_of(kind)
    plain = sampled(model, kind)
    patched = with_lora(model, lora(model, layer))
    want = sampled(patched, kind)
    freed = patched.partially_unload(patched.offload_device, 1 << 18)
    assert freed > 0 and error(sampled(patched, kind), want) < LIMIT.get(kind, 1e-5)
    patched.detach()
    assert kind == "fp8" or ours(patched.model.diffusion_model.get_submodule(layer).weight) is not None
    assert error(sampled(patched, kind), want) < 1e-5
    comfy.model_management.unload_all_models()
    assert torch.equal(sampled(model, kind), plain)


def test_hooks(model, kind):
    """A LoRA on one of two conditionings, switched on and off within each step."""
    layer, spec = layer_of(kind), spec_of(kind)
    job = Job(spec, steps=2, cfg=3.0)
    plain = job(model)
    patch = lora(model, layer)
    positive, negative = conds(spec)
    want = job(with_lora(model, patch))

    def hooked(*sides):
        group = comfy.hooks.HookGroup()
        hook = comfy.hooks.WeightHook(strength_model=1.0)
        hook.need_weight_init = False
        hook.weights = patch
        group.add(hook)
        cond = {"p": positive, "n": negative}
        made = {s: comfy.hooks.set_hooks_for_conditioning(cond[s], group) if s in sides else cond[s] for s in cond}
        run = model.clone()
        run.register_all_hook_patches(group, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
        return Job(spec, steps=2, cfg=3.0, positive=made["p"], negative=made["n"])(run)

    assert error(hooked("p", "n"), want) < 1e-5
    one = hooked("p")
    assert error(one, want) > 1e-3 and error(one, plain) > 1e-3 and torch.equal(hooked("p"), one)
    assert torch.equal(job(model), plain)


def test_saved_and_loaded_again(model, kind, files, tmp_path):  # noqa: F811
    layer = layer_of(kind)
    plain = sampled(model, kind)
    patched = with_lora(model, lora(model, layer))
    want = sampled(patched, kind)
    baked = 0.1 if kind == "fp8" else 1e-5  # core's formats have no room for a branch
    for made, expected, limit in ((model, plain, 1e-6), (patched, want, baked)):
        for name in ("model_state_dict", "state_dict_for_saving"):
            comfy.model_management.load_models_gpu([made])
            found = getattr(made, name)()
            found = {k.removeprefix("model.").removeprefix("diffusion_model."): v for k, v in found.items()}
            found = {k: v.detach().cpu().contiguous().clone() for k, v in found.items() if "model_sampling" not in k}
            save_file(found, tmp_path / "again.safetensors")
            again = load(str(tmp_path / "again.safetensors"))
            assert error(sampled(again, kind), expected) < LIMIT.get(kind, limit), name
            parts = again.model.diffusion_model.state_dict()
            assert parts.keys() == found.keys() and all(torch.equal(parts[key], found[key]) for key in found)
    deep = patched.clone(force_deepcopy=True)
    assert deep.model is not model.model and error(sampled(deep, kind), want) < 1e-5
    assert torch.equal(sampled(model.clone(), kind), plain)


def test_unloading_frees_memory(files, kind):  # noqa: F811
    model = opened(files, kind)
    patched = with_lora(model, lora(model, layer_of(kind)))
    sampled(patched, kind)
    held = [weakref.ref(p) for p in model.model.parameters()]
    comfy.model_management.unload_all_models()
    del model, patched
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    assert not [ref for ref in held if ref() is not None]
