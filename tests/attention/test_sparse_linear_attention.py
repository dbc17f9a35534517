"""The node on tiny models: nothing changes where every block is kept, and elsewhere exactly the chosen blocks act."""

import pytest
import torch
from nodes_helper import Job, error, facts, model_of, run_node, taylor
from safetensors.torch import save_file
from sparse_linear_helper import classes
from tiny_models import empty_latent

from tessera.methods.attention.call import Answer
from tessera.methods.attention.sparse_linear import SparseLinear
from tessera.methods.attention.sparse_linear_weights import Projections, write
from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.nodes.attention.sparse_linear_attention import SparseLinearAttention
from tessera.patching.attention import AttentionFeature
from tessera.patching.run import attach

NAME = "Sparse-Linear Attention"
SERVED = ("flux", "wan_meta", "sd3", "ltxv_meta", "qwen_image", "lumina2", "cosmos_predict2", "hunyuan_video", "lens")


class Masked:
    """The chosen blocks as an explicit mask on dense attention: slow, and plainly right."""

    def __init__(self, method):
        self.method = method

    def begin(self):
        return None

    def attend(self, state, call):
        critical, _ = classes(self.method, call)
        groups = call.q.shape[1] // call.k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (call.k, call.v))
        bias = torch.zeros(critical.shape).masked_fill(~critical, float("-inf"))
        if call.mask is not None:
            bias = bias + call.key_bias()[:, None, None]
        out = torch.nn.functional.scaled_dot_product_attention(call.q, k, v, bias.to(call.q.dtype), scale=call.scale)
        return Answer(out, 0.0, 0.0)


def sparse(model, **inputs):
    blocks = {"block_q": "64", "block_k": "64", "order": "tiles"}
    return run_node(SparseLinearAttention, model=model, **{"min_tokens": 0, "topk": 0.4, **blocks, **inputs})[0]


def job_of(spec, steps=2, **settings):
    """A job of some blocks: tiny models have fewer tokens than that. Ragged along every axis."""
    latent = empty_latent(spec)
    frames = [*latent.shape[2:-2]]
    sides = [*frames, 30, 32] if frames in ([], [1]) else [*frames, 18, 14]
    return Job(spec, steps=steps, cfg=1.0, latent=latent.new_zeros(*latent.shape[:2], *sides), **settings)


@pytest.mark.parametrize("name", SERVED)
def test_every_block_is_dense_attention_bit_for_bit(name):
    model, spec = model_of(name)
    job = job_of(spec)
    patched = sparse(model, topk=1.0)
    assert torch.equal(job(patched), job(model))
    told = facts(patched, NAME)
    assert told["calls"] == told["declined"]["every block is kept"] > 0 and told["pairs_fraction"] == 1


@pytest.mark.parametrize("name", SERVED)
def test_equals_the_explicit_mask(name):
    model, spec = model_of(name)
    job = job_of(spec, steps=1)
    masked = attach(model, AttentionFeature(None, "Masked", method=Masked(SparseLinear(0.4)), min_tokens=0))
    patched = sparse(model)
    got = job(patched)
    assert error(got, job(masked)) < 1e-4
    assert error(got, job(model)) > 1e-4, "the choice must act"
    told = facts(patched, NAME)
    assert told["served"] == told["calls"] > 0 and told["pairs_fraction"] < 0.9


def test_bf16():
    model, spec = model_of("flux", "bf16")
    job = job_of(spec, steps=1)
    masked = attach(model, AttentionFeature(None, "Masked", method=Masked(SparseLinear(0.4)), min_tokens=0))
    assert error(job(sparse(model)), job(masked)) < 5e-2


@pytest.fixture
def folder(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "model_patches", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


def projections(model_blocks, d, scale, **settings):
    made = {n: (scale * torch.randn(d, d) / d**0.5, scale * torch.randn(d)) for n in range(model_blocks)}
    return Projections("x", made, {"variant": "main", "feature_map": "softmax", **settings}, {})


@pytest.mark.parametrize("variant", ["main", "sla1", "paper"])
def test_weights_bring_the_linear_branch(variant, folder):
    model, spec = model_of("wan_meta")
    job = job_of(spec, steps=1)
    alone = job(sparse(model, variant=variant))
    for name, scale in (("zero", 0.0), ("some", 1.0)):
        write(folder / f"{name}.safetensors", projections(3, 24, scale, variant=variant))
    assert torch.equal(job(sparse(model, variant=variant, weights="zero.safetensors")), alone)
    patched = sparse(model, variant=variant, weights="some.safetensors")
    assert error(job(patched), alone) > 1e-3
    off = sparse(model, variant=variant, weights="some.safetensors", linear_branch=False)
    assert torch.equal(job(off), alone)


def test_weights_of_another_model_or_variant_are_refused(folder):
    model, _ = model_of("wan_meta")
    for blocks, variant, words in ((2, "main", "0-1, this Wan has 3 blocks"), (3, "sla1", "made for variant main")):
        made = projections(blocks, 24, 1.0)
        keys = {f"blocks.{n}.self_attn.attn_op.local_attn.proj_l.{p}": x for n, pair in made.blocks.items()
                for p, x in zip(("weight", "bias"), pair, strict=True)}  # fmt: skip
        save_file(keys, folder / "turbo.safetensors")
        with pytest.raises(ValueError, match=words):
            sparse(model, weights="turbo.safetensors", variant=variant)


def test_two_runs_and_another_size_between_them_are_equal():
    model, spec = model_of("flux")
    patched = sparse(model)
    job = job_of(spec)
    first = job(patched)
    Job(spec, steps=1, latent=empty_latent(spec).new_zeros(1, 16, 26, 50))(patched)
    assert torch.equal(job(patched), first)


def test_an_interrupted_run_leaves_nothing():
    model, spec = model_of("flux")
    patched = sparse(model)
    job = job_of(spec)
    first = job(patched)

    def stop(step):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        job_of(spec, on_step=stop)(patched)
    assert torch.equal(job(patched), first)


def test_blocks_and_dense_steps_decide():
    model, spec = model_of("flux")
    job = job_of(spec, steps=3)
    some = sparse(model, blocks="1-2", dense_first_steps=1)
    assert not torch.equal(job(some), job(model))
    told = facts(some, NAME)
    assert (told["served"], told["calls"]) == (4, 12)


def test_beside_others():
    from attention_helper import Foreign

    model, spec = model_of("flux")
    job = job_of(spec, steps=8)
    window = run_node(LocalWindowAttention, model=sparse(model, blocks="0-1"), radius=4, blocks="2-3", min_tokens=0)[0]
    job(window)
    assert [facts(window, name)["served"] for name in (NAME, "Local Window Attention")] == [16, 16]
    cached = taylor(sparse(model))
    plain = job(sparse(model))
    assert error(job(cached), plain) < 0.5 and facts(cached, NAME)["served"] < 32
    foreign = Foreign(model)
    job(sparse(foreign.onto(model), blocks="0-1"))
    assert foreign.calls == 16, "the other pack serves what is left"


def test_with_a_lora():
    model, spec = model_of("flux")
    job = job_of(spec, steps=1)
    key = next(k for k in model.model.state_dict() if k.endswith("double_blocks.0.img_attn.qkv.weight"))
    patched = sparse(model).clone()
    change = (torch.randn_like(model.model.state_dict()[key], device="cpu"),)
    patched.add_patches({key: change}, 0.5)
    masked = attach(model, AttentionFeature(None, "Masked", method=Masked(SparseLinear(0.4)), min_tokens=0)).clone()
    masked.add_patches({key: change}, 0.5)
    got = job(patched)
    assert error(got, job(masked)) < 1e-4 and error(got, job(sparse(model))) > 1e-3


def test_a_model_that_cannot_be_served_says_so():
    model, spec = model_of("hunyuan3d2")
    with pytest.raises(ValueError, match="a set without places"):
        sparse(model)
    job = Job(spec, steps=1)
    assert torch.equal(job(sparse(model, unsupported="warn")), job(model))
