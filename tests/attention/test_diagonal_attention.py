"""The node on tiny models: exactly the pairs within a block act in the first part of the stack, and none other."""

import pytest
import torch
from nodes_helper import Job, error, facts, model_of, run_node, taylor
from segments_helper import SERVED, Masked

from tessera.methods.attention.diagonal import Diagonal
from tessera.nodes.attention.diagonal_attention import DiagonalAttention
from tessera.nodes.attention.window_attention_3d import WindowAttention3d
from tessera.patching.attention import AttentionFeature
from tessera.patching.run import attach

NAME = "Diagonal Attention"
TINY = {"block": 16, "depth": 0.5}


def diagonal(model, **inputs):
    return run_node(DiagonalAttention, model=model, **{"min_tokens": 0, **TINY, **inputs})[0]


def explicit(model, text="dense", **settings):
    method = Diagonal(**{**TINY, **settings})
    count = sum(len(getattr(model.model.diffusion_model, name, ())) for name in ("double_blocks", "single_blocks", "blocks",
                "joint_blocks", "transformer_blocks", "layers"))  # fmt: skip

    def label(grid, block):
        offset = method.offset == "alternate_half" and block % 2 == 1
        return method.blocks(grid, offset) if block < method.depth * count else None

    return attach(model, AttentionFeature(None, "Masked", method=Masked(label, text), min_tokens=0))


@pytest.mark.parametrize("name", SERVED)
def test_a_block_that_holds_the_picture_changes_nothing(name):
    model, spec = model_of(name)
    job = Job(spec, steps=2)
    patched = diagonal(model, block=4096, depth=1.0, order="tile3d")
    assert torch.equal(job(patched), job(model))
    told = facts(patched, NAME)
    assert told["calls"] == told["declined"]["one block holds it all"] > 0 and told["pairs_fraction"] == 1


@pytest.mark.parametrize(
    "settings", [{}, {"order": "none", "offset": "alternate_half", "depth": 1.0}], ids=["first", "all"]
)
@pytest.mark.parametrize("name", SERVED)
def test_equals_the_explicit_mask(name, settings):
    model, spec = model_of(name)
    height, width = (2 * n if n < 32 else n for n in spec.latent[-2:])
    job = Job(spec, steps=2, latent=torch.zeros(1, *spec.latent[1:-2], height + 2, width))
    patched = diagonal(model, **settings)
    got, want = job(patched), job(explicit(model, **settings))
    assert error(got, want) < 1e-4
    assert error(got, job(model)) > 1e-4, "the blocks must act"
    told = facts(patched, NAME)
    assert told["served"] > 0 and 0 < told["pairs_fraction"] < 1
    all_of_it = bool(settings) or name == "pixart"  # whose only block is its first part
    assert set(told["declined"]) == (set() if all_of_it else {"behind the diagonal part of the stack"})


def test_without_the_text_and_in_bf16():
    model, spec = model_of("flux")
    job = Job(spec, steps=2)
    got = job(diagonal(model, text="none"))
    assert error(got, job(explicit(model, "none"))) < 1e-4 and error(got, job(diagonal(model))) > 1e-4
    model, spec = model_of("flux", "bf16")
    assert error(job(diagonal(model)), job(explicit(model))) < 3e-2


def test_depth_0_is_the_plain_model():
    model, spec = model_of("wan_meta")
    job = Job(spec, steps=2)
    patched = diagonal(model, depth=0.0)
    assert torch.equal(job(patched), job(model)) and facts(patched, NAME)["served"] == 0


def test_runs_repeat_and_an_interrupted_one_leaves_nothing():
    model, spec = model_of("wan_meta")
    patched, job = diagonal(model), Job(spec, steps=3)
    first = job(patched)
    odd = Job(spec, steps=2, latent=torch.zeros(1, 16, 2, 9, 22))
    assert error(odd(patched), odd(explicit(model))) < 1e-4

    def stop(step):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        Job(spec, steps=3, on_step=stop)(patched)
    assert torch.equal(job(patched), first)


def test_beside_a_cache_a_lora_and_another_attention():
    model, spec = model_of("flux")
    job = Job(spec)
    assert torch.equal(job(taylor(diagonal(model))), job(diagonal(taylor(model))))
    key = "diffusion_model.double_blocks.0.img_mlp.0.weight"
    changed = model.clone()
    changed.add_patches({key: ("diff", (torch.randn(model.model_state_dict()[key].shape) * 0.2,))}, 1.0)
    assert error(job(diagonal(changed)), job(explicit(changed))) < 1e-4
    later = {"wt": 2, "wh": 2, "ww": 2, "global_every": 0, "min_tokens": 0, "blocks": "2-3"}
    both = run_node(WindowAttention3d, model=diagonal(model), **later)[0]
    job(both)
    assert facts(both, NAME)["served"] == facts(both, "Window Attention 3D")["served"] == 16


def test_a_foreign_override_underneath_keeps_the_other_blocks():
    from attention_helper import Foreign

    model, spec = model_of("flux")
    foreign = Foreign(model)
    patched = diagonal(foreign.onto(model))
    with foreign.counting():
        Job(spec, steps=2, cfg=1.0)(patched)
    assert foreign.image == 2 * 2 and facts(patched, NAME)["served"] == 2 * 2


def test_a_model_that_cannot_be_served_says_so():
    model, spec = model_of("hunyuan3d2")
    with pytest.raises(ValueError, match="without places"):
        diagonal(model)
    job = Job(spec, steps=1)
    assert torch.equal(job(diagonal(model, unsupported="warn")), job(model))
