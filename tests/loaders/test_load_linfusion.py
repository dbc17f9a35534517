"""LinFusion's files on a tiny UNet of Stable Diffusion: keys and shapes of the official format, the official formula, and
a MODEL that is as before once the node is gone."""

import json
from pathlib import Path
from types import SimpleNamespace

import comfy.ops
import comfy.utils
import pytest
import torch
import torch.nn.functional as F
from nodes_helper import Job, error, facts, run_node, taylor
from safetensors.torch import save_file
from tiny_models import build_direct
from tiny_specs import Spec

from tessera.methods.attention import linfusion as m
from tessera.nodes.loaders import load_linfusion as node
from tessera.patching import linfusion as patching

KEYS = json.loads((Path(__file__).parents[1] / "golden/keys/linfusion.json").read_text())
UNET = {
    "LinFusion-1-5": {"num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "transformer_depth": [1] * 6 + [0] * 2,
                          "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1},
    "LinFusion-XL": {"num_res_blocks": [2] * 3, "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
                         "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10},
}  # fmt: skip
TINY = {
    "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1], "channel_mult": [1, 2], "num_heads": 4,
    "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "context_dim": 16,
    "use_spatial_transformer": True, "image_size": 32, "legacy": False, "adm_in_channels": None, "use_linear_in_transformer": False,
}  # fmt: skip
SPEC = Spec(
    "modules.diffusionmodules.openaimodel:UNetModel", TINY, latent=(1, 4, 7, 10), context=(1, 6, 16), direct="SD15"
)
NAMES = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1", "down_blocks.1.attentions.0.transformer_blocks.0.attn1",
    "mid_block.attentions.0.transformer_blocks.0.attn1",
]  # fmt: skip
PATHS = ["input_blocks.1.1", "input_blocks.3.1", "middle_block.1"]


@pytest.fixture(scope="module")
def unet():
    return build_direct(SPEC)


def config(names=NAMES[:2], mid=None, heads=4):
    widths = [32 if name.startswith("down_blocks.0") else 64 for name in names]
    entries = [
        {"module_name": name, "dim_n": c, "heads": heads, "projection_mid_dim": mid}
        for name, c in zip(names, widths, strict=True)
    ]
    return json.dumps({"_class_name": "LinFusion", "modules_list": entries})


def weights_of(text, dtype=torch.float32, scale=1.0):
    generator, found = torch.Generator().manual_seed(2), {}
    for i, module in enumerate(m.modules_of(text)):
        for key, shape in module.shapes().items():
            value = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
            found[f"{i}.{key}"] = (value * (scale if "_." in key else 1)).to(dtype)
    return found


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes the two files; -> the MODEL with them."""

    def write(model, text=None, weights=None, min_tokens=0):
        text = config() if text is None else text
        path = tmp_path / "diffusion_pytorch_model.safetensors"
        save_file(weights_of(text) if weights is None else weights, str(path))
        (tmp_path / "config.json").write_text(text)
        monkeypatch.setattr(node.folder_paths, "get_full_path_or_raise", lambda folder, name: str(path))
        return run_node(node.LoadLinfusion, model=model, linfusion=path.name, min_tokens=min_tokens)[0]

    return write


def test_the_keys_are_the_published_ones():
    module = m.Module("x.attn1", 6, 2, 5)
    want = {key: tuple({"C": 6, "M": 5}[n] for n in shape) for key, shape in KEYS["keys"].items()}
    assert {f"0.{key}": shape for key, shape in module.shapes().items()} == want
    assert m.modules_of(json.dumps(KEYS["config"])) == [
        m.Module(KEYS["config"]["modules_list"][0]["module_name"], 320, 8)
    ]
    assert set(m.Module("x.attn1", 6, 2, -1).shapes()) == {key[2:] for key in want if "_." not in key}


@pytest.mark.parametrize("name", UNET)
def test_every_module_of_the_published_files_has_its_place(name):
    known, count = comfy.utils.unet_to_diffusers(UNET[name]), 0
    for block, (attentions, depth) in KEYS["modules"][name]["attentions"].items():
        for i in range(attentions):
            for t in range(depth):
                count += f"{block}.attentions.{i}.transformer_blocks.{t}.attn1.to_q.weight" in known
    assert count == KEYS["modules"][name]["count"] == sum(key.endswith("attn1.to_q.weight") for key in known)


@pytest.mark.parametrize("mid", [None, 8, -1])
@pytest.mark.parametrize("tokens", [64, 1025])
def test_the_formula(mid, tokens):
    text = config(NAMES[:1], mid)
    weights = weights_of(text)
    module = m.build(m.modules_of(text), weights, comfy.ops.manual_cast)[0]
    x, w = torch.randn(2, tokens, 32), {key[2:]: value for key, value in weights.items()}

    def f(name, x):
        if mid == -1:
            return x
        y = F.linear(x, w[f"{name}.0.weight"], w[f"{name}.0.bias"])
        y = F.leaky_relu(F.layer_norm(y, y.shape[-1:], w[f"{name}.1.weight"], w[f"{name}.1.bias"]), 0.01)
        return F.linear(y, w[f"{name}.3.weight"], w[f"{name}.3.bias"])

    q, k, v = (x + f("to_q_", x)) @ w["to_q.weight"].T, (x + f("to_k_", x)) @ w["to_k.weight"].T, x @ w["to_v.weight"].T
    q, k, v = (t.unflatten(2, (4, 8)).transpose(1, 2) for t in (q, k, v))
    pairs = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(2, 3) / tokens
    want = (pairs @ v / (pairs.sum(-1, keepdim=True) + 1e-4)).transpose(1, 2).flatten(2)
    want = F.linear(want, w["to_out.0.weight"], w["to_out.0.bias"])
    assert error(module(x, x, x), want) < 1e-5
    turn = torch.randperm(tokens)
    assert error(module(x, x[:, turn], x[:, turn]), want) < 1e-5, "keys have no order"


def test_half_precision_of_many_tokens_is_finite():
    text = config(NAMES[:1])
    module = m.build(m.modules_of(text), weights_of(text, torch.float16), comfy.ops.manual_cast)[0]
    x = torch.randn(1, 65536, 32, dtype=torch.float16)
    assert next(module.parameters()).dtype == torch.float16 and bool(module(x, x, x).isfinite().all())


def test_hits_exactly_the_listed_modules_and_leaves_nothing(unet, file):
    job = Job(SPEC, steps=2)
    plain = job(unet)
    patched = file(unet)
    assert set(patched.object_patches) == {f"diffusion_model.{p}.transformer_blocks.0.attn1.forward" for p in PATHS[:2]}
    assert not unet.object_patches and not unet.additional_models
    got = job(patched)
    assert error(got, plain) > 1e-3 and torch.equal(job(patched), got)
    told = facts(patched, "Load LinFusion")
    assert told["modules"] == 2 and told["linear"] in (4, 8) and told["plain"] == 0, "2 steps, prompts joined or not"
    assert torch.equal(job(unet), plain)
    three = file(unet, config(NAMES))
    assert error(job(three), got) > 1e-3 and facts(three, "Load LinFusion")["modules"] == 3


def test_below_min_tokens_the_model_keeps_its_own(unet, file):
    job = Job(SPEC, steps=2)
    plain = job(unet)
    assert torch.equal(job(file(unet, min_tokens=71)), plain)
    some = file(unet, min_tokens=70)  # 7 x 10 latent; the deeper layer has 4 x 5
    assert not torch.equal(job(some), plain)
    told = facts(some, "Load LinFusion")
    assert told["linear"] == told["plain"] > 0


def test_zero_projections_with_the_models_own_weights(unet, file):
    """f = 0 and the base's own q, k, v: what is left is the operator alone, whatever else f holds."""
    text, state = config(), unet.model_state_dict()
    weights = weights_of(text)
    for i, path in enumerate(PATHS[:2]):
        for key in [k for k in weights if k.startswith(f"{i}.")]:
            own = f"diffusion_model.{path}.transformer_blocks.0.attn1.{key[2:]}"
            weights[key] = state[own].clone().float() if own in state else weights[key]
    zero = {k: torch.zeros_like(v) if "_.3." in k else v for k, v in weights.items()}
    other = {k: v * 2 if "_.0." in k else v for k, v in zero.items()}
    job = Job(SPEC, steps=2)
    assert torch.equal(job(file(unet, text, zero)), job(file(unet, text, other)))


def test_beside_a_cache_a_lora_and_attention_patches(unet, file):
    job, patched = Job(SPEC, steps=2), file(unet)
    want, cached = job(patched), taylor(patched, level="output")
    assert torch.isfinite(Job(SPEC, steps=6)(cached)).all() and facts(cached)["forecast"] > 0
    assert torch.equal(job(taylor(patched, level="output", interval=1)), want)
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q.weight"

    def lora(model):
        changed = model.clone()
        changed.add_patches({key: ("diff", (torch.ones_like(model.model_state_dict()[key]),))})
        return changed

    assert torch.equal(job(lora(file(unet))), job(file(lora(unet)))) and not torch.equal(
        job(lora(patched)), job(patched)
    )
    theirs, seen = patched.clone(), []
    theirs.set_model_attn1_patch(lambda n, context, value, extra: (seen.append(1) or n, context, value))
    assert torch.equal(job(theirs), want) and seen
    with pytest.raises(ValueError, match="on this MODEL already"):
        file(patched)


@pytest.mark.parametrize(("change", "words"), [
    (lambda w: w.pop("1.to_k_.1.bias"), r"lacks 1.to_k_.1.bias \[64\]"),
    (lambda w: w.update({"2.to_q.weight": torch.ones(2, 2)}), "holds 2.to_q.weight"),
    (lambda w: w.update({"0.to_q.bias": torch.ones(32)}), "holds 0.to_q.bias"),
    (lambda w: w.update({"0.to_q.weight": torch.ones(32, 16)}), r"0.to_q.weight is \[32, 16\].*asks for \[32, 32\]"),
])  # fmt: skip
def test_a_file_that_does_not_fit_its_config(unet, file, change, words):
    weights = weights_of(config())
    change(weights)
    with pytest.raises(ValueError, match=words):
        file(unet, weights=weights)


@pytest.mark.parametrize(("text", "words"), [
    ("{}", "none of LinFusion's"),
    (json.dumps({"modules_list": []}), "lists no modules"),
    (config(heads=3), "do not split into 3 heads"),
    (config(heads=8), "32 channels in 4 heads here, this LinFusion file 32 in 8"),
    (config(["down_blocks.7.attentions.0.transformer_blocks.0.attn1"]), "no self-attention down_blocks.7"),
    (config([NAMES[0][:-1] + "2"]), "no self-attention"),
    (config(mid=0), "must be null, -1 or a width"),
])  # fmt: skip
def test_another_base_or_config_is_refused(unet, file, text, words):
    try:
        weights = weights_of(text)
    except ValueError:
        weights = weights_of(config())
    with pytest.raises(ValueError, match=words):
        file(unet, text, weights)


def test_a_missing_config_and_another_model_are_refused(tmp_path):
    save_file({"x": torch.ones(1)}, str(tmp_path / "w.safetensors"))
    with pytest.raises(ValueError, match="needs its config.json beside"):
        patching.files(str(tmp_path / "w.safetensors"))
    model = SimpleNamespace(
        model=SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1), model_config=SimpleNamespace(unet_config={}))
    )
    with pytest.raises(ValueError, match="UNet of Stable Diffusion 1.5, 2.1 and XL; Linear is none"):
        patching.paths(m.modules_of(config()), model)
