"""Apply DiT4SR beside other nodes: what stands outside its blocks sees the picture's tokens alone, what stands inside is told
of the others."""

import pytest
import torch
from attention_helper import Exact, plan
from comfy.controlnet import ControlBase
from dit4sr_helper import BASE, CONTROL, NAME, SPEC, Port, applied, job, model_of_base, picture, tiny_adapter, wanted
from nodes_helper import Job, conds, error, facts, run_node, taylor
from quantized_helper import folder  # noqa: F401

from tessera.nodes.attention.sparse_linear_attention import SparseLinearAttention
from tessera.nodes.cache.step_cache import StepCache
from tessera.nodes.loaders.quantize_model import QuantizeModel
from tessera.patching.blocks import BlockFeature
from tessera.patching.run import attach


@pytest.fixture(scope="module")
def adapter():
    return tiny_adapter()


@pytest.fixture(scope="module")
def plain():
    return model_of_base(BASE)


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
