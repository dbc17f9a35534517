"""The node on tiny models: what it refuses, that it serves exactly the chosen blocks, and that a graft file acts."""

import json

import pytest
import torch
from nodes_helper import Job, comfy, error, facts, kinds, model_of, run_node, taylor
from safetensors.torch import save_file

from tessera.methods.attention.call import Answer
from tessera.methods.attention.linear import turned
from tessera.nodes.attention import linear_attention as node
from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.patching.attention import AttentionFeature
from tessera.patching.run import attach

NAME = "Linear Attention"
SERVED = ("flux", "wan_meta", "sd3", "ltxv_meta", "qwen_image", "lumina2", "cosmos_predict2", "hunyuan_video")


def linear(model, **inputs):
    return run_node(node.LinearAttention, model=model, **{"min_tokens": 0, "blocks": "1", **inputs})[0]


class Explicit:
    """The same from the weights of all pairs: slow, and plainly right."""

    def begin(self):
        return None

    def attend(self, state, call):
        groups = call.q.shape[1] // call.k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (call.k, call.v))
        weights = call.q.relu() @ k.relu().transpose(2, 3)
        if call.mask is not None:
            weights = weights * call.key_bias().exp()[:, None, None]
        linear = weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)
        bias = None if call.mask is None else call.key_bias()[:, None, None].to(k.dtype)
        out = torch.nn.functional.scaled_dot_product_attention(call.q, k, v, bias, scale=call.scale)
        out[:, :, call.layout.image] = linear[:, :, call.layout.image]
        return Answer(out, 0.0, 0.0)


@pytest.mark.parametrize("name", SERVED)
def test_equals_all_weights_written_down(name):
    model, spec = model_of(name)
    job, patched = Job(spec, steps=2), linear(model)
    want = job(attach(model, AttentionFeature(None, "E", method=Explicit(), min_tokens=0, blocks=frozenset({1}))))
    got = job(patched)
    assert error(got, want) < 1e-4 and error(got, job(model)) > 1e-4
    assert facts(patched, NAME)["served"] > 0
    assert torch.equal(job(patched), got)


def test_a_stock_model_is_not_replaced_whole():
    model, spec = model_of("flux")
    for all_of_them in ("all", "0-3"):
        with pytest.raises(ValueError, match="all 4 blocks of a stock Flux gives noise.*or turn allow_untrained on"):
            linear(model, blocks=all_of_them)
    linear(model, blocks="all", dense_first_blocks=1)
    patched = linear(model, blocks="all", allow_untrained=True)
    assert torch.isfinite(Job(spec, steps=2)(patched)).all() and facts(patched, NAME)["served"] == 8


def test_off_changes_nothing():
    model, spec = model_of("flux")
    job = Job(spec, steps=2)
    for off in ({"min_tokens": 4096}, {"start_percent": 1.0}, {"blocks": "1", "scope": "self"}):
        assert torch.equal(job(linear(model, **off)), job(model))


def test_bf16_and_odd_sizes():
    model, spec = model_of("wan_meta", "bf16")
    job = Job(spec, steps=2, latent=torch.zeros(1, 16, 3, 7, 11))
    assert error(job(linear(model, feature_map="elu1", normalizer="mean", eps=1e-4)), job(model)) < 1.0


def test_the_rope_table_undoes_what_the_model_did():
    """What the node finds as the model's RoPE turns queries back to what they were before it."""
    model, spec = model_of("flux")
    before, undone = [], []

    class Spy(Explicit):
        wants_rotation = True

        def attend(self, state, call):
            undone.append(turned(call.q, call.forward.rotation, back=True))
            return super().attend(state, call)

    def note(q, k, v, pe=None, attn_mask=None, extra_options=None):
        before.append(q)
        return {}

    theirs = model.clone()
    theirs.set_model_attn1_patch(note)
    Job(spec, steps=1)(attach(theirs, AttentionFeature(None, "S", method=Spy(), min_tokens=0)))
    assert len(before) == len(undone) == 4
    assert all(error(got, want) < 1e-5 for got, want in zip(undone, before, strict=True))


def test_dual_track():
    for name in ("flux", "qwen_image", "chroma"):
        model, spec = model_of(name)
        patched, job = linear(model, rope="dual"), Job(spec, steps=2)
        got = job(patched)
        assert facts(patched, NAME)["served"] > 0 and torch.isfinite(got).all()
        assert error(got, job(linear(model))) > 1e-4
    model, spec = model_of("wan_meta")
    patched = linear(model, rope="dual")
    assert torch.equal(Job(spec, steps=1)(patched), Job(spec, steps=1)(model))
    assert "this model does not tell its RoPE, which dual needs" in facts(patched, NAME)["declined"]


def test_a_graft_file_acts(tmp_path, monkeypatch):
    model, spec = model_of("flux")
    heads = model.model.diffusion_model.num_heads
    width = model.model.diffusion_model.hidden_size
    weights = {"graft.double_blocks.1.dwc.weight": torch.zeros(width, 1, 3, 3),
               "graft.single_blocks.0.gamma": torch.ones(heads)}  # fmt: skip
    path = tmp_path / "trained.safetensors"
    told = {"format": "graft_v1", "op": "linear", "arch": "Flux", "hparams": json.dumps({"eps": 1e-6})}
    save_file(weights, str(path), told)
    monkeypatch.setattr(node.folder_paths, "get_full_path_or_raise", lambda folder, name: str(path))
    job = Job(spec, steps=2)
    patched = linear(model, graft=path.name, blocks="all")
    assert error(job(patched), job(linear(model, blocks="1-2"))) < 1e-6, "parameters that change nothing"
    assert facts(patched, NAME)["declined"] == {"the graft has no weights for this block": 4}
    save_file({**weights, "graft.double_blocks.1.dwc.weight": torch.ones(width, 1, 3, 3)}, str(path), told)
    assert error(job(linear(model, graft=path.name, blocks="all")), job(patched)) > 1e-3
    with pytest.raises(ValueError, match="trained for Flux, not for Stable Diffusion 3"):
        linear(model_of("sd3")[0], graft=path.name)


def test_beside_everything_else():
    model, spec = model_of("flux")
    job = Job(spec, steps=8)
    one, two = linear(taylor(model)), taylor(linear(model))
    assert torch.equal(job(one), job(two)) and kinds(one) == "ffppfppf"
    assert facts(one, NAME)["served"] == 4
    key = "diffusion_model.double_blocks.1.img_attn.qkv.weight"
    weight = torch.randn(model.model_state_dict()[key].shape, generator=torch.Generator().manual_seed(4)) * 0.2

    def lora(model):
        patched = model.clone()
        patched.add_patches({key: ("diff", (weight,))})
        return patched

    assert torch.equal(job(linear(lora(model))), job(lora(linear(model))))
    theirs, seen = model.clone(), []
    theirs.model_options["transformer_options"]["optimized_attention_override"] = lambda func, *args, **kwargs: (
        seen.append(1) or func(*args, **kwargs)
    )
    over = linear(theirs, blocks="0-1")
    job(over)
    assert facts(over, NAME)["served"] == len(seen) == 16
    both = linear(run_node(LocalWindowAttention, model=model, radius=2, min_tokens=0, blocks="2-3")[0])
    job(both)
    assert facts(both, NAME)["served"] == 8 and facts(both, "Local Window Attention")["served"] == 16


def test_interrupted_runs_leave_nothing():
    model, spec = model_of("flux")
    patched, job = linear(model), Job(spec, steps=2)
    want = job(patched)

    def stop(step):
        raise comfy.model_management.InterruptProcessingException()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        Job(spec, steps=2, on_step=stop)(patched)
    assert torch.equal(job(patched), want)
