"""The node on tiny models: nothing changes where everything is chosen, and elsewhere the image tokens see exactly what
the definition says, whatever stands before or after them."""

import pytest
import torch
from log_linear_helper import explicit
from nodes_helper import Job, error, facts, model_of, run_node, taylor
from tiny_models import empty_latent

import comfy.model_management  # isort: skip

from tessera.methods.attention.call import Answer
from tessera.methods.attention.log_linear_sparse import LogLinearSparse
from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.nodes.attention.log_linear_sparse_attention import LogLinearSparseAttention
from tessera.patching.attention import OVERRIDE, AttentionFeature
from tessera.patching.run import attach

NAME = "Log-Linear Sparse Attention"
SERVED = ("flux", "wan_meta", "sd3", "ltxv_meta", "qwen_image", "lumina2", "cosmos_predict2", "hunyuan_video", "lens",
          "pixart", "ernie")  # fmt: skip


class Explicit:
    """The same attention from its definition, a head at a time."""

    def __init__(self, **settings):
        self.method = LogLinearSparse(**settings)

    def begin(self):
        return None

    def attend(self, state, call):
        (batch, heads), group = call.q.shape[:2], call.q.shape[1] // call.k.shape[1]
        bias, out = call.key_bias(), torch.empty_like(call.q)
        for b in range(batch):
            for h in range(heads):
                one = (call.q[b, h], call.k[b, h // group], call.v[b, h // group])
                out[b, h] = explicit(self.method, call.layout, *one, call.scale, None if bias is None else bias[b])
        return Answer(out, 0.0, 0.0)


def sparse(model, **inputs):
    return run_node(LogLinearSparseAttention, model=model, **{"min_tokens": 0, "reorder": "tile3d", **inputs})[0]


def job_of(spec, **settings):
    """On a picture of odd sizes, three times as large as the tiny models' own along its height."""
    latent = empty_latent(spec)
    shape = [*latent.shape]
    shape[-2], shape[-1] = 3 * shape[-2], shape[-1] + 2
    return Job(spec, latent=latent.new_zeros(shape), **{"steps": 2, **settings})


@pytest.mark.parametrize("name", SERVED)
def test_all_patches_change_nothing(name):
    model, spec = model_of(name)
    job = job_of(spec)
    plain = job(model)
    for inputs in ({"density": 1.0}, {"topk": 4096, "enrich": False}):
        patched = sparse(model, **inputs)
        assert torch.equal(job(patched), plain)
        told = facts(patched, NAME)
        assert told["calls"] == told["declined"]["every patch is chosen"] > 0 and told["pairs_fraction"] == 1


@pytest.mark.parametrize("name", SERVED)
def test_equals_the_definition(name):
    model, spec = model_of(name)
    job = job_of(spec, steps=1)
    patched = sparse(model, topk=1)
    want = attach(
        model, AttentionFeature(None, "Explicit", method=Explicit(topk=1, exclude_selected=True), min_tokens=0)
    )
    got = job(patched)
    assert error(got, job(want)) < 1e-4
    assert error(got, job(model)) > 1e-5, "it must act"
    told = facts(patched, NAME)
    assert told["served"] > 0 and told["pairs_fraction"] < 1 and not told["declined"]


@pytest.mark.parametrize("name", ["flux", "wan_meta"])
def test_bf16(name):
    model, spec = model_of(name, "bf16")
    job = job_of(spec)
    want = attach(
        model, AttentionFeature(None, "Explicit", method=Explicit(topk=1, exclude_selected=True), min_tokens=0)
    )
    assert error(job(sparse(model, topk=1)), job(want)) < 3e-2


@pytest.mark.parametrize("inputs", [{"reorder": "tile2d", "block": "32"}, {"levels": "2", "exclude_selected": False}])
def test_settings_reach_the_method(inputs):
    model, spec = model_of("wan_meta")
    job = job_of(spec, steps=1)
    settings = {"topk": 1, "exclude_selected": True} | {
        k: int(v) if k in ("block", "levels") else v for k, v in inputs.items()
    }
    want = attach(model, AttentionFeature(None, "Explicit", method=Explicit(**settings), min_tokens=0))
    assert error(job(sparse(model, topk=1, **inputs)), job(want)) < 1e-4


def test_runs_leave_nothing_behind():
    model, spec = model_of("flux")
    patched = sparse(model, topk=1)
    job = job_of(spec)
    plain, first = job(model), job(patched)
    Job(spec, steps=2, latent=torch.zeros(1, 16, 10, 26))(patched)

    def cancel(step):
        comfy.model_management.interrupt_current_processing(True)

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        job_of(spec, steps=4, on_step=cancel)(patched)
    assert torch.equal(job(patched), first) and torch.equal(job(model), plain)


def test_blocks_steps_and_size_decide():
    model, spec = model_of("flux")
    job = job_of(spec, steps=4, cfg=1.0)
    plain = job(model)
    assert torch.equal(job(sparse(model, topk=1, min_tokens=4096)), plain)
    some = sparse(model, topk=1, blocks="1-2", dense_first_steps=1)
    assert not torch.equal(job(some), plain)
    assert facts(some, NAME)["served"] == 6
    assert facts(some, NAME)["declined"] == {"outside the chosen blocks": 6, "outside the chosen steps": 4}


def test_beside_another_attention_node_on_other_blocks():
    model, spec = model_of("flux")
    job = job_of(spec)
    window = {"model": model, "radius": 2, "min_tokens": 0, "blocks": "2-3"}
    both = sparse(run_node(LocalWindowAttention, **window)[0], topk=1, blocks="0-1")
    got = job(both)
    told = [facts(both, name) for name in (NAME, "Local Window Attention")]
    assert told[0]["served"] == told[1]["served"] > 0
    turned = run_node(LocalWindowAttention, **(window | {"model": sparse(model, topk=1, blocks="0-1")}))[0]
    assert torch.equal(job(turned), got)


def test_with_a_cache_a_lora_and_a_foreign_override():
    model, spec = model_of("flux")
    job = job_of(spec, steps=8)
    cached = taylor(sparse(model, topk=1))
    assert error(job(cached), job(model)) > 1e-5
    assert facts(cached)["blocks_skipped"] > 0 and facts(cached, NAME)["served"] > 0
    patched = sparse(model, topk=1, blocks="0")
    weights = patched.clone()
    key = next(k for k in weights.model_state_dict() if k.endswith("img_mlp.0.weight"))
    down, up = (
        torch.randn(2, weights.model_state_dict()[key].shape[1]),
        torch.randn(weights.model_state_dict()[key].shape[0], 2),
    )
    weights.add_patches({key: ("diff", (0.1 * up @ down,))})
    assert error(job(weights), job(patched)) > 1e-5
    foreign = patched.clone()
    met = []

    def override(func, *args, **kwargs):
        met.append(1)
        return func(*args, **kwargs)

    foreign.model_options["transformer_options"][OVERRIDE] = override
    assert torch.equal(job(foreign), job(patched)) and met


def test_a_model_that_cannot_be_served_says_so():
    model, spec = model_of("hunyuan3d2")
    with pytest.raises(ValueError, match=f"{NAME} cannot act here"):
        sparse(model)
    job = Job(spec, steps=1)
    assert torch.equal(job(sparse(model, unsupported="warn")), job(model))
