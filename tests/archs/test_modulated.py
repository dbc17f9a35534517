"""What TeaCache measures is what the first block really makes of its input, and its polynomials are those that were
published."""

import pytest
import torch
from nodes_helper import Job, error, model_of

from tessera import archs
from tessera.patching.blocks import BlockFeature
from tessera.patching.run import attach

# where the modulated input is used, below the diffusion model, and whether it goes in or comes out there
USED = {
    "flux": ("double_blocks.0.img_attn.qkv", "in"),
    "flux2": ("double_blocks.0.img_attn.qkv", "in"),
    "chroma": ("double_blocks.0.img_attn.qkv", "in"),
    "chroma_radiance": ("double_blocks.0.img_attn.qkv", "in"),
    "sd3": ("joint_blocks.0.x_block.attn.qkv", "in"),
    "qwen_image": ("transformer_blocks.0.attn.to_q", "in"),
    "hunyuan_video": ("double_blocks.0.img_attn.qkv", "in"),
    "ltxv_meta": ("transformer_blocks.0.attn1", "in"),
    "lumina2": ("layers.0.attention", "in"),
    "mochi": ("blocks.0.attn.qkv_x", "in"),
    "wan_meta": ("time_embedding", "out"),
    "wan_vace": ("time_embedding", "out"),
    "cogvideox": ("norm_out", "temb"),
}
NEAR = {"fp32": 1e-6, "bf16": 5e-3}  # core may multiply and add in one rounding


class Asks(BlockFeature):
    """Keeps what forward.modulated() says at the first block of each call."""

    def begin(self, run):
        return self.node

    def around_block(self, state, forward, block, streams, proceed):
        if block.number == 0:
            state.append((forward.modulated().clone(), len(forward.keys)))
        return proceed(streams)


def given(module, place, kept):
    """Keeps what the module was given or gave."""

    def hook(_, args, kwargs, out):
        kept.append((out if place == "out" else kwargs[place] if place in kwargs else args[0]).clone())

    return module.register_forward_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("name", USED)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_modulated_is_what_the_first_block_uses(name, dtype):
    model, spec = model_of(name, dtype)
    told, used = [], []
    path, place = USED[name]
    handle = given(model.model.diffusion_model.get_submodule(path), place, used)
    try:
        Job(spec, steps=2)(attach(model, Asks(told, "Asks")))
    finally:
        handle.remove()
    used = used[::2] if place == "out" else used  # asking runs the timestep's embedding once more
    assert len(told) == len(used) == 2
    for (mine, keys), true in zip(told, used, strict=True):
        assert keys == 2 and error(mine, true[: true.shape[0] // 2].reshape(mine.shape)) < NEAR[dtype]
    assert not torch.equal(told[0][0], told[1][0])


def test_every_family_with_a_polynomial_tells_what_it_measures():
    found = {a.name for a in archs.all_archs().values() if a.rescaled}
    assert found == {"Flux", "HunyuanVideo", "LTX-Video", "Lumina 2", "Mochi", "Wan", "Wan VACE", "CogVideoX"}
    assert all(a.modulated for a in archs.all_archs().values() if a.rescaled)


@pytest.mark.parametrize(
    "name, source",
    [
        ("flux", "FLUX.1"), ("hunyuan_video", "HunyuanVideo"), ("ltxv_meta", "LTX-Video"), ("lumina2", "Lumina 2"),
        ("wan_meta", "Wan 2.1 T2V 1.3B"), ("wan_i2v", "Wan 2.1 I2V 480p 14B"), ("cogvideox", "CogVideoX 2B"),
        ("mochi", "Mochi 1"), ("flux2", None), ("z_image", None),
    ],
)  # fmt: skip
def test_which_polynomial(name, source):
    diffusion_model = model_of(name)[0].model.diffusion_model
    made = archs.find(diffusion_model).rescaled(diffusion_model, None)
    assert (made and made[0]) == source
    assert made is None or len(made[1]) == 5


def test_wan_is_told_apart_by_its_width_and_its_picture():
    model = model_of("wan_meta")[0].model.diffusion_model
    rescaled = archs.find(model).rescaled

    class Told:
        model_type, dim = "t2v", 5120

    assert rescaled(Told, None)[0] == "Wan 2.1 T2V 14B" and rescaled(Told, None)[1][4] == -13.02252404
    Told.dim = 1536
    assert rescaled(Told, None)[0] == "Wan 2.1 T2V 1.3B"
    Told.model_type = "i2v"
    assert rescaled(Told, (21, 30, 52))[0] == "Wan 2.1 I2V 480p 14B"
    assert rescaled(Told, (21, 45, 80))[0] == "Wan 2.1 I2V 720p 14B"


def test_tokens_of_several_timesteps():
    """HunyuanVideo keeps the frame it starts from at another timestep than the rest."""
    from tessera.archs._modulate import under

    x = torch.randn(2, 6, 4)
    scale, shift = torch.randn(2, 2, 4), torch.randn(2, 2, 4)
    made = under(x, scale, shift, [(0, 2, 0), (2, None, 1)])
    assert torch.equal(made[:, :2], x[:, :2] * (1 + scale[:, :1]) + shift[:, :1])
    assert torch.equal(made[:, 2:], x[:, 2:] * (1 + scale[:, 1:]) + shift[:, 1:])
    assert torch.equal(under(x, scale, shift), x * (1 + scale[:, :1]) + shift[:, :1])
