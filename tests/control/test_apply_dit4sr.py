"""Apply DiT4SR against the authors' forward, and what must hold beside it: the plain MODEL where it does not act, every row
of a batch, other nodes, and nothing left behind."""

import gc
import weakref
from dataclasses import fields

import comfy.model_patcher
import pytest
import torch
from attention_helper import Exact, plan
from comfy.controlnet import ControlBase
from dit4sr_helper import SPEC, Port, Vae, base, control, model_of_base
from nodes_helper import Job, conds, error, facts, model_of, run_node, taylor
from quantized_helper import folder  # noqa: F401
from safetensors.torch import save_file
from tiny_models import empty_latent

from tessera.methods.control.dit4sr import read
from tessera.nodes.attention.sparse_linear_attention import SparseLinearAttention
from tessera.nodes.cache.dynamic_grain import DynamicGrain as DynamicGrainNode
from tessera.nodes.cache.step_cache import StepCache
from tessera.nodes.control.apply_dit4sr import ApplyDit4sr
from tessera.nodes.loaders.quantize_model import QuantizeModel
from tessera.patching.blocks import BlockFeature
from tessera.patching.dit4sr import Adapter, Dit4srFeature, enlarged
from tessera.patching.run import attach

NAME = "Apply DiT4SR"
SIGMAS = [1.0, 0.6, 0.3, 0.0]
BASE, CONTROL = base(), control()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    path = tmp_path_factory.mktemp("dit4sr_r1") / "control.safetensors"
    save_file(CONTROL, str(path))
    return Adapter.of(read(path, "r1"))


@pytest.fixture(scope="module")
def plain():
    return model_of_base(BASE)


def picture(height=16, width=24, batch=1):
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(3))


def applied(model, adapter, image=None, **inputs):
    """(MODEL, LATENT's samples)."""
    image = picture() if image is None else image
    out = run_node(ApplyDit4sr, model=model, adapter=adapter, image=image, vae=Vae(), **inputs)
    return out[0], out[1]["samples"]


def job(latent=None, **settings):
    return Job(SPEC, sigmas=torch.tensor(SIGMAS), latent=latent, **settings)


def wanted(port, image, latent, cfg=3.0, upscale=4.0):
    """What the authors' forward samples for the same noise and prompts."""
    noise = torch.randn(latent.shape, generator=torch.manual_seed(7))
    low = (Vae().encode(enlarged(image, upscale, 8)) - 0.0609) * 1.5305
    prompts = [(c, extra["pooled_output"]) for ((c, extra),) in conds(SPEC)]
    return port.sample(noise, low, SIGMAS, prompts, cfg)


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


class Outside(BlockFeature):
    """A feature outside of DiT4SR's."""

    def around_block(self, state, forward, block, streams, proceed):
        out = proceed(streams)
        self.node.append((streams[0].shape[1], out[0].shape[1], forward.appended))
        return out


@pytest.mark.parametrize("first", [True, False])
def test_between_blocks_there_are_the_pictures_tokens_alone(plain, adapter, first):
    seen, inside = [], []
    model = attach(plain, Outside(seen)) if first else plain
    model, latent = applied(model, adapter)
    model = model if first else attach(model, Outside(seen))
    module = plain.model.diffusion_model.joint_blocks[2].x_block.mlp.fc1
    handle = module.register_forward_hook(lambda _, args, out: inside.append(out.shape[1]))
    try:
        job(latent)(model)
    finally:
        handle.remove()
    assert seen == [(24, 24, 0)] * 9 and inside == [48] * 3


class Residuals(ControlBase):
    """What core adds behind every block."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        tokens = x_noisy.shape[-2] * x_noisy.shape[-1] // 4
        made = torch.randn(3, 1, tokens, 192, generator=torch.Generator().manual_seed(9))
        return {"input": [], "output": [row.expand(len(x_noisy), -1, -1) for row in made]}


def test_a_controlnet_adds_to_the_picture_alone(plain, adapter, monkeypatch):
    model, latent = applied(plain, adapter)
    residuals = torch.randn(3, 1, 24, 192, generator=torch.Generator().manual_seed(9))
    block = Port.block

    def with_residuals(self, i, both, text, temb, grid):
        x, text = block(self, i, both, text, temb, grid)
        return torch.cat((x[:, :24] + residuals[i], x[:, 24:]), 1), text

    monkeypatch.setattr(Port, "block", with_residuals)
    want = wanted(Port({**BASE, **CONTROL}), picture(), latent)
    positive, negative = ([[c, {**extra, "control": Residuals()}]] for ((c, extra),) in conds(SPEC))
    got = job(latent, positive=positive, negative=negative)(model)
    assert error(got, want) < 1e-5


class Layouts(Exact):
    """Dense attention that notes the layouts it is shown."""

    def attend(self, state, call):
        self.seen.append((call.kind, call.layout.grid, call.layout.image, call.layout.total))
        return super().attend(state, call)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_attention_nodes_beside_it_are_told_the_layout(plain, adapter, strength):
    """Text, picture, low-resolution tokens; without text in the second attention. At full keep all is as without."""
    model, latent = applied(plain, adapter, strength=strength)
    method = Layouts()
    method.seen = []
    got = job(latent)(plan(model, method))
    assert error(got, job(latent)(model)) < 1e-6
    joint, own = ("joint", (1, 4, 6), slice(10, 34), 58), ("self", (1, 4, 6), slice(0, 24), 48)
    assert method.seen == [joint, own, joint, own, joint] * 3


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_sparse_linear_attention_beside_it(plain, adapter, strength):
    model, latent = applied(plain, adapter, picture(32, 48), strength=strength)
    sparse = run_node(SparseLinearAttention, model=model, topk=0.9, min_tokens=0, block_q="16", block_k="16")[0]
    got, want = job(latent)(sparse), job(latent)(model)
    told = facts(sparse, "Sparse-Linear Attention")
    assert told["served"] == told["calls"] == 15, "three joint and two further calls in each of three steps"
    assert not torch.equal(got, want) and error(got, want) < 0.3
    assert facts(sparse, NAME)["tokens"] == 96
    whole = run_node(SparseLinearAttention, model=model, topk=1.0, min_tokens=0)[0]
    assert torch.equal(job(latent)(whole), want)


def test_a_lora_on_the_model_reaches_both_pictures_tokens(plain, adapter):
    """The adapter's layers stand behind the model's own projections, so what a LoRA adds to those counts for both."""
    change = torch.randn(3 * 192, 192, generator=torch.Generator().manual_seed(4)) / 50
    model, latent = applied(plain, adapter)
    model.add_patches({"diffusion_model.joint_blocks.1.x_block.attn2.qkv.weight": ("diff", (change,))}, 1.0)
    weights = {**BASE, **CONTROL}
    for name, part in zip("qkv", change.chunk(3), strict=True):
        key = f"transformer_blocks.1.attn2.to_{name}.weight"
        weights[key] = weights[key] + part
    want = wanted(Port(weights), picture(), latent)
    assert error(job(latent)(model), want) < 1e-5 < error(want, wanted(Port({**BASE, **CONTROL}), picture(), latent))


@pytest.mark.usefixtures("folder")
def test_quantized_weights_beneath_it(plain, adapter):
    made = run_node(QuantizeModel, model=plain, format="int8_row", filename="tiny", existing="replace")[0]
    model, latent = applied(made, adapter)
    want = wanted(Port({**BASE, **CONTROL}), picture(), latent)
    assert 1e-4 < error(job(latent)(model), want) < 0.2
    off, _ = applied(made, adapter, strength=0.0)
    assert torch.equal(job(latent)(off), job(latent)(made))


def test_taylor_cache_beside_it(plain, adapter):
    model, latent = applied(plain, adapter)
    schedule = torch.linspace(1, 0, 9)
    run = Job(SPEC, sigmas=schedule, latent=latent)
    cached = taylor(model)
    got = run(cached)
    assert torch.isfinite(got).all() and facts(cached)["forecast"] > 0
    assert facts(cached, NAME)["acted"] == facts(cached)["full"] < 8
    assert torch.equal(run(taylor(model, interval=1)), run(model)), "one that skips nothing changes nothing"


def test_blocks_behind_skipped_ones_get_the_tokens_of_the_last_full_call(plain, adapter):
    """DBCache computes the first and the last block and skips those between."""
    model, latent = applied(plain, adapter)
    run = Job(SPEC, sigmas=torch.linspace(1, 0, 9), latent=latent)
    cached = run_node(StepCache, model=model, policy="DBCache", threshold=4.0, first_blocks=1, last_blocks=1, warmup=2,
                      fill="reuse")[0]  # fmt: skip
    got = run(cached)
    assert torch.isfinite(got).all()
    assert facts(cached, "Step Cache")["forecast"] > 0 and error(got, run(model)) < 0.5
    off = run_node(StepCache, model=model, policy="DBCache", threshold=0.0, first_blocks=1, last_blocks=1)[0]
    assert torch.equal(run(off), run(model))


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


def test_the_helpers_model_is_what_core_makes_of_the_file(plain):
    """The port without the adapter's tokens is the plain MODEL: so differences above are the adapter's."""
    assert empty_latent(SPEC).shape[1] == 16
    blocks = plain.model.diffusion_model.joint_blocks
    assert [block.x_block.x_block_self_attn for block in blocks] == [True, True, False]
    weight = blocks[1].x_block.attn2.qkv.weight
    thirds = [BASE[f"transformer_blocks.1.attn2.to_{n}.weight"] for n in "qkv"]
    assert torch.equal(weight.float(), torch.cat(thirds))
