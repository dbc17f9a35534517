"""Load SANA-Video: the network is diffusers' own, number by number, and lives in ComfyUI as its other models do."""

import json
import shutil

import comfy.lora
import comfy.model_management
import comfy.samplers
import comfy.sd
import diffusers
import diffusers_helper as tiny
import folder_paths
import pytest
import torch
from nodes_helper import error, facts, run_node, taylor
from quantized_helper import folder  # noqa: F401 - a fixture
from safetensors.torch import load_file, save_file
from sana_helper import NAME, model, network, sampled

from tessera import archs
from tessera.nodes.loaders.load_sana_video import LoadSanaVideo
from tessera.nodes.loaders.quantize_model import QuantizeModel
from tessera.patching.sana_video_load import load, models

WEIGHTS = "diffusion_pytorch_model.safetensors"


def called(x, t, text, mask=None, net=None):
    return (net or network()).denoise(x, t, text, mask)


def diffusers_own(x, t, text, mask=None, made=None):
    """Its class takes one time step a token where it takes several."""
    if t.ndim == 2:
        t = t.repeat_interleave(x.shape[3] * x.shape[4] // 4, 1)
    more = {"encoder_hidden_states": text, "encoder_attention_mask": mask, "timestep": t, "return_dict": False}
    return (made or tiny.plain(NAME))(x, **more)[0]


@pytest.mark.parametrize("sides", [(3, 4, 6), (5, 8, 4), (1, 2, 2)])
@pytest.mark.parametrize("per_frame", [False, True])
def test_as_diffusers(sides, per_frame):
    x, text = torch.randn(2, 16, *sides), torch.randn(2, tiny.TOKENS, tiny.TEXT)
    mask = (torch.arange(tiny.TOKENS) < 4).float().expand(2, -1)
    t = 1000 * (torch.rand(2, sides[0]) if per_frame else torch.rand(2))
    want = diffusers_own(x, t, text, mask)
    assert want.std() > 0.3 and (called(x, t, text, mask) - want).abs().max() < 1e-5
    assert (called(x, t, text) - want).abs().max() > 1e-3


@pytest.mark.parametrize("exact", [True, False])
def test_as_diffusers_in_bf16(tmp_path, exact):
    x, text, t = torch.randn(2, 16, 3, 4, 6), torch.randn(2, tiny.TOKENS, tiny.TEXT), torch.tensor([700.0, 90.0])
    half = load(str(tiny.save(NAME, tmp_path)), "bfloat16", exact).model.diffusion_model
    made = diffusers.SanaVideoTransformer3DModel(**tiny.TINY[NAME].config)
    made.load_state_dict(tiny.plain(NAME).state_dict())
    given = [v.bfloat16() for v in (x, text)]
    theirs = diffusers_own(given[0], t, given[1], made=made.bfloat16())
    want = diffusers_own(x, t, text)
    assert error(called(given[0], t, given[1], net=half).float(), want) < max(1e-2, 1.2 * error(theirs.float(), want))


def test_the_sampler_denoises_as_diffusers_does():
    for settings in ({"cfg": 2.0}, {"batch": 2}):
        got, want = tiny.sampled(model(), NAME, **settings), tiny.reference(NAME, **settings)
        assert want.abs().max() > 1 and (got - want).abs().max() < 1e-4


def test_frames_that_a_mask_keeps_have_time_step_zero():
    """Image to video, as diffusers' pipeline runs it."""
    x, first, levels = tiny.noise(NAME), torch.randn(1, 16, 1, 4, 6), [*tiny.SIGMAS, 0.0]
    mask = torch.ones(1, 1, 3, 1, 1)
    mask[:, :, 0] = 0
    c = tiny.conditions(NAME)
    want = torch.cat((first, x[:, :, 1:]), 2)
    for sigma, following in zip(levels, levels[1:], strict=False):
        v = diffusers_own(want, 1000 * sigma * mask[:, 0, :, 0, 0], c["cross_attn"], c["attention_mask"])
        want = want + (following - sigma) * v * mask
    made = model()
    latent = made.model.process_latent_out(torch.cat((first, torch.zeros(1, 16, 2, 4, 6)), 2))
    cond = tiny.conditioning(NAME)
    got = comfy.sample.sample(
        made, x, 4, 1.0, "euler", "simple", cond, cond, latent, noise_mask=mask.expand(1, 1, 3, 4, 6), disable_pbar=True,
        sigmas=torch.tensor(levels), seed=1,
    )  # fmt: skip
    assert (made.model.process_latent_in(got) - want).abs().max() < 1e-4


@pytest.fixture
def release(tmp_path):
    return tiny.save(NAME, tmp_path)


def test_the_node_finds_a_release_shards_and_single_files(release, tmp_path):
    tiny.save(NAME, tmp_path / "sharded", max_shard_size="40KB")
    shutil.copy(release / WEIGHTS, tmp_path / "one.safetensors")
    shutil.copy(release / "config.json", tmp_path / "one.json")
    for kind in ("diffusers", "diffusion_models"):
        folder_paths.add_model_folder_path(kind, str(tmp_path))
    try:
        want = tiny.sampled(model(), NAME)
        for name in (f"{NAME}/transformer", f"sharded/{NAME}/transformer", "one.safetensors"):
            assert name in LoadSanaVideo.GET_SCHEMA().inputs[0].options
            assert torch.equal(tiny.sampled(run_node(LoadSanaVideo, model=name)[0], NAME), want)
    finally:
        for kind in ("diffusers", "diffusion_models"):
            folder_paths.folder_names_and_paths[kind][0].remove(str(tmp_path))


def test_sizes_are_told_by_the_tensors_where_no_config_is(tmp_path):
    settings = {**tiny.TINY[NAME].config, "num_attention_heads": 1, "attention_head_dim": 112, "cross_attention_dim": 112,
                "num_cross_attention_heads": 1, "cross_attention_head_dim": 112, "num_layers": 1, "mlp_ratio": 3.0}  # fmt: skip
    plain = diffusers.SanaVideoTransformer3DModel(**settings)
    save_file(plain.state_dict(), tmp_path / "alone.safetensors")
    (tmp_path / "half-00001-of-00002.safetensors").touch()
    assert list(models([str(tmp_path)], [str(tmp_path)])) == ["alone.safetensors"]
    net = load(str(tmp_path / "alone.safetensors")).model.diffusion_model
    x, text, t = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 3, tiny.TEXT), torch.tensor([500.0])
    with torch.no_grad():
        assert (called(x, t, text, net=net) - diffusers_own(x, t, text, made=plain)).abs().max() < 1e-5


def changed(release, **entries):
    path = release / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"_class_name": "WanTransformer3DModel"}, "is for WanTransformer3DModel"),
        ({"guidance_embeds": True}, "guidance_embeds True"),
        ({"qk_norm": "layer_norm"}, "qk_norm 'layer_norm'"),
        ({"num_layers": 10**9}, "num_layers 1000000000"),
        ({"num_layers": 3}, "lacks transformer_blocks.2"),
        ({"patch_size": 2}, "patch_size 2"),
        ({"cross_attention_dim": 64}, "one width"),
        ({"in_channels": 4, "out_channels": 4}, "latents of 4 channels"),
        ({"attention_head_dim": "16"}, "attention_head_dim '16'"),
        ({"mlp_ratio": 2.0}, "but its config makes it"),
    ],
)
def test_wrong_configs_get_a_sentence(release, entries, words):
    changed(release, **entries)
    with pytest.raises(ValueError, match=words.replace("(", r"\(")) as caught:
        load(str(release))
    assert str(caught.value).endswith(".") and len(str(caught.value)) < 400


def test_wrong_files_get_a_sentence(release, tmp_path):
    held = load_file(release / WEIGHTS)
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors is no SANA-Video"):
        load(str(tmp_path / "other.safetensors"))
    save_file(held, tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match="heads of 112 do not divide.*narrow.json"):
        load(str(tmp_path / "narrow.safetensors"))
    held.pop("transformer_blocks.1.ff.conv_temp.weight")
    save_file(held, release / WEIGHTS)
    with pytest.raises(ValueError, match="lacks transformer_blocks.1.ff.conv_temp.weight"):
        load(str(release))
    eps_folder = tmp_path / NAME / "scheduler"
    eps_folder.mkdir()
    (eps_folder / "scheduler_config.json").write_text(json.dumps({"prediction_type": "epsilon"}))
    with pytest.raises(ValueError, match="samples a flow"):
        load(str(release))


def test_conditioning_that_it_cannot_read_gets_a_sentence():
    euler = comfy.samplers.ksampler("euler")
    with pytest.raises(ValueError, match="text of width 24, and this CONDITIONING has 96"):
        sampled(model(), euler, positive=[[torch.zeros(1, 4, 96), {}]])
    image = [[torch.zeros(1, 4, tiny.TEXT), {"concat_latent_image": torch.zeros(1, 16, 4, 4, 6)}]]
    with pytest.raises(ValueError, match="an image to start from"):
        sampled(model(), euler, positive=image)


@pytest.mark.parametrize("level", ["last_block", "block_residual", "module", "output"])
def test_caches_know_its_blocks(level):
    euler, sigmas = comfy.samplers.ksampler("euler"), torch.linspace(1, 0, 9)
    plain, made = sampled(model(), euler, sigmas=sigmas), taylor(model(), level=level)
    assert 0 < error(sampled(made, euler, sigmas=sigmas), plain) < 1 and facts(made)["forecast"] > 0
    off = taylor(model(), level=level, interval=1)
    assert torch.equal(sampled(off, euler, sigmas=sigmas), plain)


def test_its_layout_is_known():
    arch = archs.find(network())
    assert arch.name == "SANA-Video" and arch.grid(network(), torch.zeros(1, 16, 3, 4, 6)) == (3, 2, 3)
    assert archs.find(type("SanaVideo", (type(network()),), {})) is None


def test_lora_on_offloaded_layers():
    """As with too little memory; in diffusers' names, on a Linear and on a convolution over time."""
    keys = {"transformer_blocks.0.attn1.to_q": (32, 32), "transformer_blocks.1.ff.conv_temp": (32, 96)}
    weights = {}
    for key, (rows, columns) in keys.items():
        weights[f"transformer.{key}.lora_A.weight"] = torch.randn(2, columns)
        weights[f"transformer.{key}.lora_B.weight"] = torch.randn(rows, 2)
    patched = comfy.sd.load_lora_for_models(model(), None, weights, 0.3, 0.0)[0]
    assert set(patched.patches) == {f"diffusion_model.{key}.weight" for key in keys}
    euler = comfy.samplers.ksampler("euler")
    plain, want = sampled(model(), euler), sampled(patched, euler)
    assert error(want, plain) > 1e-3
    patched.detach()
    patched.load(comfy.model_management.get_torch_device(), lowvram_model_memory=1)
    layers = [m for m in patched.model.diffusion_model.modules() if getattr(m, "weight_function", None)]
    assert len(layers) == 2
    assert error(sampled(patched, euler), want) < 1e-5
    patched.detach()
    assert torch.equal(sampled(model(), euler), plain)


def test_fp8_weights(release):
    euler, small = comfy.samplers.ksampler("euler"), load(str(release), "fp8_e4m3fn")
    assert small.model.diffusion_model.transformer_blocks[0].ff.conv_temp.weight.dtype == torch.float8_e4m3fn
    assert 1e-4 < error(sampled(small, euler), sampled(model(), euler)) < 0.3


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Two heads of 112, so that every format's groups fit."""
    heads = {f"{kind}_heads": 2 for kind in ("num_attention", "num_cross_attention")}
    dims = {"attention_head_dim": 112, "cross_attention_head_dim": 112, "cross_attention_dim": 224, "num_layers": 1}
    plain = diffusers.SanaVideoTransformer3DModel(**{**tiny.TINY[NAME].config, **heads, **dims, "mlp_ratio": 3.0})
    place = tmp_path_factory.mktemp("wide") / "transformer"
    plain.save_pretrained(place)
    return load(str(place))


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("form", ["nvfp4", "int8_row", "tlq4"])
def test_quantized_weights(wide, form):
    """Written by Quantize Model, which knows no other loader, and back: ComfyUI alone would not know the file."""
    euler, net = comfy.samplers.ksampler("euler"), wide.model.diffusion_model
    with torch.inference_mode():
        made = run_node(QuantizeModel, model=wide.clone(), format=form, filename=f"sana_{form}")[0]
    kinds = {type(p).__name__ for p in made.model.diffusion_model.parameters()}
    assert len(kinds) == 2 and made.model.diffusion_model.sizes == net.sizes
    assert 1e-3 < error(sampled(made, euler), sampled(wide.clone(), euler)) < 0.5
    assert archs.find(made.model.diffusion_model).name == "SANA-Video"
