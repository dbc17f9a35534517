"""Apply DiT4SR against the authors' forward: the plain MODEL where it does not act, every row of a batch, and nothing left
behind."""

import gc
import weakref
from dataclasses import fields

import comfy.model_patcher
import pytest
import torch
from dit4sr_helper import (
    BASE,
    CONTROL,
    NAME,
    SPEC,
    Port,
    Vae,
    applied,
    job,
    model_of_base,
    picture,
    tiny_adapter,
    wanted,
)
from nodes_helper import Job, conds, error, facts, model_of, run_node

from tessera.nodes.cache.dynamic_grain import DynamicGrain as DynamicGrainNode
from tessera.nodes.control.apply_dit4sr import ApplyDit4sr
from tessera.patching.dit4sr import Dit4srFeature, enlarged
from tessera.patching.run import attach


@pytest.fixture(scope="module")
def adapter():
    return tiny_adapter()


@pytest.fixture(scope="module")
def plain():
    return model_of_base(BASE)


@pytest.mark.parametrize(("mode", "legacy"), [("auto", False), ("fixed_r1", False), ("legacy_v1", True)])
@pytest.mark.parametrize("side", [(16, 24), (28, 12), (8, 8)], ids=str)
def test_the_authors_forward(plain, adapter, mode, legacy, side):
    image = picture(*side)
    model, latent = applied(plain, adapter, image, key_mode=mode)
    assert latent.shape == (1, 16, side[0] // 2, side[1] // 2) and not latent.any()
    want = wanted(Port({**BASE, **CONTROL}, legacy), image, latent)
    got = job(latent)(model)
    assert got.shape == latent.shape and error(got, want) < 1e-5
    other = wanted(Port({**BASE, **CONTROL}, not legacy), image, latent)
    assert error(got, other) > 1e-3 and error(job(latent)(plain), want) > 1e-2


def test_odd_sides_are_padded_as_the_model_pads_its_own(plain, adapter):
    image = picture(18, 26)
    model, latent = applied(plain, adapter, image)
    assert latent.shape == (1, 16, 9, 13)
    noise = torch.randn(latent.shape, generator=torch.manual_seed(7))
    got = Job(SPEC, sigmas=torch.tensor([1.0, 0.0]), latent=latent, noise=noise)(model)
    low = (Vae().encode(enlarged(image, 4, 8)) - 0.0609) * 1.5305
    whole = (torch.nn.functional.pad(x, (0, 1, 0, 1), mode="circular") for x in (noise, low))
    prompts = [(c, extra["pooled_output"]) for ((c, extra),) in conds(SPEC)]
    want = Port({**BASE, **CONTROL}).sample(*whole, [1.0, 0.0], prompts, 3.0)[..., :9, :13]
    assert error(got, want) < 1e-5


def test_strength_and_conv_scale(plain, adapter):
    image = picture()
    for strength, scale in ((0.4, 1.2), (1.5, 0.7), (1.0, 0.0)):
        model, latent = applied(plain, adapter, image, strength=strength, conv_scale=scale)
        want = wanted(Port({**BASE, **CONTROL}, scale=scale, weight=strength), image, latent)
        assert error(job(latent)(model), want) < 1e-5
    near, latent = applied(plain, adapter, image, strength=1e-6)
    assert error(job(latent)(near), job(latent)(plain)) < 1e-4, "it goes to the plain MODEL"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("inputs", [{"strength": 0.0}, {"start_percent": 1.0}, {"end_percent": 0.0}], ids=str)
def test_where_it_does_not_act_it_is_the_plain_model(adapter, dtype, inputs):
    model = model_of_base(BASE, dtype)
    patched, latent = applied(model, adapter, **inputs)
    assert torch.equal(job(latent)(patched), job(latent)(model))
    assert facts(patched, NAME)["calls"] == 3 and facts(patched, NAME)["acted"] == 0


def test_it_acts_in_its_part_of_the_run_alone(plain, adapter):
    model, latent = applied(plain, adapter, end_percent=0.5)
    assert not torch.equal(job(latent)(model), job(latent)(plain))
    told = facts(model, NAME)
    assert 0 < told["acted"] < told["calls"]


def test_each_row_is_right_joined_and_separate(plain, adapter, monkeypatch):
    image = picture(batch=2)
    model, latent = applied(plain, adapter, image)
    assert latent.shape[0] == 2
    want = wanted(Port({**BASE, **CONTROL}), image, latent)
    joined = job(latent)(model)
    assert error(joined, want) < 1e-5 and facts(model, NAME)["calls"] == 3
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 0)
    assert error(job(latent)(model), want) < 1e-5 and facts(model, NAME)["calls"] == 6


def test_one_picture_serves_a_batch_of_latents(plain, adapter):
    model, latent = applied(plain, adapter)
    both = torch.cat((latent, latent))
    want = wanted(Port({**BASE, **CONTROL}), picture(batch=1).expand(2, -1, -1, -1), both)
    assert error(job(both)(model), want) < 1e-5


def test_bfloat16(adapter):
    model, latent = applied(model_of_base(BASE, "bf16"), adapter)
    want = wanted(Port({**BASE, **CONTROL}), picture(), latent)
    assert error(job(latent)(model), want) < 0.05


def test_the_same_again_and_two_models_from_one(plain, adapter):
    model, latent = applied(plain, adapter)
    other, _ = applied(plain, adapter, 1 - picture())
    first, second = job(latent)(model), job(latent)(other)
    assert torch.equal(job(latent)(model), first) and torch.equal(job(latent)(other), second)
    assert not torch.equal(first, second)
    before = job(latent)(plain)
    assert torch.equal(job(latent)(plain), before)


def test_nothing_is_left_after_a_run(plain, adapter):
    model, latent = applied(plain, adapter)
    seen = []

    class Spy(Dit4srFeature):
        def begin(self, run):
            state = super().begin(run)
            seen.append(weakref.ref(state))
            return state

    feature = model.model_options["transformer_options"]["tessera_features"][0]
    given = {field.name: getattr(feature, field.name) for field in fields(feature)}
    watched = attach(plain, Spy(**given))
    job(latent)(watched)

    def stop(step):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        job(latent, on_step=stop)(watched)
    gc.collect()
    assert len(seen) == 2 and all(ref() is None for ref in seen)


def test_refusals(plain, adapter):
    model, latent = applied(plain, adapter)
    with pytest.raises(ValueError, match=r"8 x 12 in latent space, and the model is asked for 8 x 8"):
        job(latent[..., :8])(model)
    with pytest.raises(ValueError, match="on this MODEL already"):
        applied(model, adapter)
    with pytest.raises(ValueError, match="leaves some out"):
        run_node(DynamicGrainNode, model=model)
    with pytest.raises(ValueError, match="this MODEL is Flux. Load sd3.5_medium"):
        applied(model_of("flux")[0], adapter)
    with pytest.raises(ValueError, match="this MODEL has 2 blocks of width 128"):
        applied(model_of("sd3")[0], adapter)
    with pytest.raises(ValueError, match="needs a VAE"):
        run_node(ApplyDit4sr, model=plain, adapter=adapter, image=picture(), vae=None)
    with pytest.raises(ValueError, match="must not lie after"):
        applied(plain, adapter, start_percent=0.8, end_percent=0.2)


def test_the_picture_is_enlarged_as_pillow_does():
    from PIL import Image

    image = picture(9, 13)
    got = enlarged(image, 2.5, 8)
    assert got.shape == (1, 16, 32, 3)
    channels = [Image.fromarray(image[0, ..., c].numpy()).resize((32, 16), Image.Resampling.BICUBIC) for c in range(3)]
    want = torch.stack([torch.tensor(list(c.get_flattened_data())).view(16, 32) for c in channels], -1).clamp(0, 1)
    assert (got[0] - want).abs().max() < 1e-5


def test_the_helpers_model_is_the_files_base(plain):
    """By ComfyUI's own converter: thirds of the joined projection, and a last block that makes nothing of its text."""
    blocks = plain.model.diffusion_model.joint_blocks
    assert [block.x_block.x_block_self_attn for block in blocks] == [True, True, False]
    assert [block.context_block.pre_only for block in blocks] == [False, False, True]
    for i, name, core in (
        (1, "attn2.to", "x_block.attn2"),
        (2, "attn.to", "x_block.attn"),
        (2, "attn.add", "context_block.attn"),
    ):
        end = "_proj" if "add" in name else ""
        thirds = [BASE[f"transformer_blocks.{i}.{name}_{n}{end}.weight"] for n in "qkv"]
        assert torch.equal(blocks[i].get_submodule(core).qkv.weight.float(), torch.cat(thirds))
