"""Load Diffusers Model: the stock sampler denoises as diffusers' own loop does, for every class in the table."""

import json
import shutil

import comfy.model_management
import comfy.sample
import diffusers_helper as tiny
import folder_paths
import pytest
import torch

from tessera.nodes.loaders.class_label import ClassLabel
from tessera.nodes.loaders.load_diffusers_model import LoadDiffusersModel
from tessera.patching.diffusers_load import load
from tessera.patching.diffusers_table import TABLE


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model folder of ComfyUI with every class in it."""
    root = tmp_path_factory.mktemp("diffusers")
    for name in tiny.TINY:
        tiny.save(name, root)
    folder_paths.add_model_folder_path("diffusers", str(root))
    yield root
    folder_paths.folder_names_and_paths["diffusers"][0].remove(str(root))


@pytest.fixture(scope="module")
def model(root):
    made = {}
    return lambda name: made.setdefault(
        name, LoadDiffusersModel.execute(f"{name.replace(':', '_')}/transformer", "default")[0]
    )


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest, against the largest value where that is above 1: eps models of random weights denoise to hundreds."""
    assert got.shape == want.shape and want.abs().max() > 0.1
    return ((got - want).abs().max() / want.abs().max().clamp_min(1)).item()


def test_every_row_is_tried():
    assert set(TABLE) == set(tiny.CLASSES) and len(TABLE) >= 10


@pytest.mark.parametrize("name", tiny.TINY)
def test_as_diffusers_with_guidance(model, name):
    assert difference(tiny.sampled(model(name), name, cfg=2.0), tiny.reference(name, cfg=2.0)) < 1e-4


@pytest.mark.parametrize("name", tiny.CLASSES)
def test_as_diffusers_in_a_batch(model, name):
    got, want = tiny.sampled(model(name), name, batch=2), tiny.reference(name, batch=2)
    assert difference(got, want) < 1e-4
    assert difference(got[:1], want[1:]) > 1e-2


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "DiTTransformer2DModel"])
def test_one_file_with_a_config_beside(root, model, tmp_path, name):
    folder = root / name / "transformer"
    shutil.copy(folder / "diffusion_pytorch_model.safetensors", tmp_path / "one.safetensors")
    shutil.copy(folder / "config.json", tmp_path / "one.json")
    assert torch.equal(tiny.sampled(load(str(tmp_path / "one.safetensors")), name), tiny.sampled(model(name), name))


def test_shards(model, tmp_path):
    folder = tiny.save("WanTransformer3DModel", tmp_path, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    got, want = (m.model.diffusion_model.state_dict() for m in (load(str(folder)), model("WanTransformer3DModel")))
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


def test_the_node_lists_what_it_can_load(root):
    (root / "FluxTransformer2DModel" / "vae").mkdir(exist_ok=True)
    (root / "FluxTransformer2DModel" / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    options = LoadDiffusersModel.define_schema().inputs[0].options
    assert {f"{name}/transformer" for name in tiny.CLASSES} <= set(options)
    assert not any("vae" in option for option in options)
    with pytest.raises(ValueError, match=r"^gone is in neither .* Choose another\.$"):
        LoadDiffusersModel.execute("gone", "default")


def test_old_config_of_dit(root, model, tmp_path):
    """The released DiT and PixArt say Transformer2DModel, from before they had classes of their own."""
    folder = shutil.copytree(root / "DiTTransformer2DModel" / "transformer", tmp_path / "transformer")
    config = json.loads((folder / "config.json").read_text())
    config |= {"_class_name": "Transformer2DModel", "only_cross_attention": False, "num_vector_embeds": None}
    (folder / "config.json").write_text(json.dumps(config))
    name = "DiTTransformer2DModel"
    assert torch.equal(tiny.sampled(load(str(folder)), name), tiny.sampled(model(name), name))


def test_no_class_is_the_null_class(model):
    name = "DiTTransformer2DModel"
    made = model(name)

    def run(label):
        start, cond = tiny.noise(name), ClassLabel.execute(label)[0]
        return comfy.sample.sample(
            made, start, 2, 1.0, "euler", "simple", cond, cond, torch.zeros_like(start), disable_pbar=True, seed=0
        )

    assert torch.equal(run(-1), run(1000)) and not torch.equal(run(-1), run(3))
    with pytest.raises(ValueError, match="classes 0 to 999, not 1001"):
        run(1001)


def refused(made, name, shape=None, **changes):
    """The sentence of a run with entries of its CONDITIONING changed; None takes one away."""
    text, extra = tiny.conditioning(name)[0]
    text = changes.pop("cross_attn", text)
    extra = {k: v for k, v in {**extra, **changes}.items() if v is not None}
    latent = torch.zeros(1, *(shape or tiny.TINY[name].latent))
    with pytest.raises(ValueError) as caught:
        comfy.sample.sample(
            made, latent, 1, 1.0, "euler", "simple", [[text, extra]], [[text, extra]], latent, disable_pbar=True, seed=0
        )
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    return str(caught.value)


def without(made, name, guidance):
    """A sample with that guidance in its CONDITIONING, or none."""
    text, extra = tiny.conditioning(name)[0]
    extra = {k: v for k, v in {**extra, "guidance": guidance}.items() if v is not None}
    cond, start = [[text, extra]], tiny.noise(name)
    return comfy.sample.sample(
        made, start, 1, 1.0, "euler", "simple", cond, cond, torch.zeros_like(start), disable_pbar=True, seed=0
    )


def test_conditions_that_do_not_fit(model):
    flux, dit, latte = "FluxTransformer2DModel", "DiTTransformer2DModel", "LatteTransformer3DModel"
    assert "needs a pooled text" in refused(model(flux), flux, pooled_output=None)
    assert torch.equal(without(model(flux), flux, None), without(model(flux), flux, 3.5))  # as core's Flux
    cog = "CogVideoXTransformer3DModel"
    assert "a text of 6 tokens" in refused(model(f"{cog}:2b"), cog, cross_attn=torch.zeros(1, 5, 24))
    assert "joins 2 latent frames in a token, and the latent has 3" in refused(model(f"{cog}:1.5"), cog)
    assert "width 24, and this CONDITIONING has 7" in refused(model(flux), flux, cross_attn=torch.zeros(1, 3, 7))
    assert "width 20, and this CONDITIONING has 4" in refused(model(flux), flux, pooled_output=torch.zeros(1, 4))
    assert "reference images" in refused(model(flux), flux, reference_latents=[torch.zeros(1, 16, 8, 8)])
    assert "needs a class" in refused(model(dit), dit, class_label=None)
    assert "squares only, and this latent is 12 x 8" in refused(model(dit), dit, shape=(4, 8, 12))
    assert "1 or 3 frames, and the latent has 2" in refused(model(latte), latte, shape=(4, 2, 8, 4))


@pytest.mark.parametrize(
    "name", ["PixArtTransformer2DModel", "FluxTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel"]
)
def test_sides_that_no_patch_divides(model, name):
    *channels, _, _ = tiny.TINY[name].latent
    start = torch.randn(1, *channels, 7, 9)
    out = tiny.sampled(model(name), name, start=start)
    assert out.shape == start.shape and out.isfinite().all()


def test_bfloat16(root, model):
    for name in tiny.CLASSES:
        half = load(str(root / name / "transformer"), "bfloat16")
        assert half.model.get_dtype() == torch.bfloat16
        kept = getattr(half.model.diffusion_model.bridged, "_keep_in_fp32_modules", None) or ()
        for key, weight in half.model.diffusion_model.state_dict().items():
            if weight.ndim > 1 and "table" not in key and "pos_embed" not in key:
                fp32 = any(part in key.split(".") for part in kept)
                assert weight.dtype == (torch.float32 if fp32 else torch.bfloat16), key
        got, want = tiny.sampled(half, name), tiny.sampled(model(name), name)
        assert ((got - want).norm() / want.norm()).item() < 0.1, name


def test_interrupt_leaves_the_model_as_it_was(model):
    name = "FluxTransformer2DModel"
    made, before = model(name), tiny.sampled(model(name), name)

    def stop(step, *_):
        raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tiny.sampled(made, name, callback=stop)
    assert torch.equal(tiny.sampled(made, name), before)


def test_an_autoencoder_of_its_own(root, tmp_path):
    """A Flux of one latent channel: refused alone, and sampled with its autoencoder's config beside it."""
    from diffusers import FluxTransformer2DModel

    config = {**tiny.TINY["FluxTransformer2DModel"].config, "in_channels": 4}
    FluxTransformer2DModel(**config).save_pretrained(tmp_path / "transformer")
    with pytest.raises(
        ValueError, match=r"with 1 channels are not known: it has usually 16 channels\. Put its vae/config"
    ):
        load(str(tmp_path / "transformer"))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(
        json.dumps({"latent_channels": 1, "scaling_factor": 1.5, "shift_factor": 0.25})
    )
    made, start, cond = (
        load(str(tmp_path / "transformer")),
        torch.randn(1, 1, 8, 12),
        tiny.conditioning("FluxTransformer2DModel"),
    )
    out = comfy.sample.sample(
        made, start, 2, 1.0, "euler", "simple", cond, cond, torch.zeros_like(start), disable_pbar=True, seed=0
    )
    assert out.shape == start.shape and out.isfinite().all()
    latents = made.get_model_object("latent_format")
    assert torch.allclose(latents.process_out(latents.process_in(start)), start, atol=1e-6)
    assert torch.allclose(latents.process_in(start), (start - 0.25) * 1.5)
