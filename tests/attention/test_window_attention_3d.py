"""The node on tiny models: exactly the pairs within a window act, and nothing where the window spans the grid."""

import pytest
import torch
from nodes_helper import Job, error, facts, model_of, run_node, taylor
from segments_helper import SERVED, Masked

from tessera.methods.attention.window_3d import Window3D
from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.nodes.attention.window_attention_3d import WindowAttention3d
from tessera.patching.attention import AttentionFeature
from tessera.patching.run import attach

NAME = "Window Attention 3D"
SMALL = {"wt": 2, "wh": 2, "ww": 2, "shift": "alternate", "global_every": 3}


def window(model, **inputs):
    return run_node(WindowAttention3d, model=model, **{"min_tokens": 0, **SMALL, **inputs})[0]


def explicit(model, text="dense", **where):
    method = Window3D(**SMALL)

    def label(grid, block):
        return None if method.is_global(block) else method.windows(grid, method.is_shifted(block))

    feature = AttentionFeature(None, "Masked", method=Masked(label, text), min_tokens=0, **where)
    return attach(model, feature)


@pytest.mark.parametrize("name", SERVED)
def test_a_window_that_spans_the_grid_changes_nothing(name):
    model, spec = model_of(name)
    job = Job(spec, steps=2)
    patched = window(model, wt=64, wh=64, ww=64, global_every=0)
    assert torch.equal(job(patched), job(model))
    told = facts(patched, NAME)
    assert told["calls"] == told["declined"]["one window spans it all"] > 0 and told["pairs_fraction"] == 1


@pytest.mark.parametrize("name", SERVED)
def test_equals_the_explicit_mask(name):
    model, spec = model_of(name)
    job = Job(spec, steps=2)
    patched = window(model)
    got, want = job(patched), job(explicit(model))
    assert error(got, want) < 1e-4
    assert error(got, job(model)) > 1e-4, "the windows must act"
    told = facts(patched, NAME)
    assert told["served"] > 0 and 0 < told["pairs_fraction"] < 1
    assert set(told["declined"]) <= {"a global block"}


@pytest.mark.parametrize("name", ["flux", "hunyuan_video"])
def test_without_the_text(name):
    model, spec = model_of(name)
    job = Job(spec, steps=2)
    got = job(window(model, text="none"))
    assert error(got, job(explicit(model, "none"))) < 1e-4 and error(got, job(window(model))) > 1e-4


@pytest.mark.parametrize("name", ["flux", "wan_meta"])
def test_bf16(name):
    model, spec = model_of(name, "bf16")
    job = Job(spec, steps=2)
    assert error(job(window(model)), job(explicit(model))) < 3e-2


def test_all_blocks_global_is_the_plain_model():
    model, spec = model_of("flux")
    job = Job(spec, steps=2)
    patched = window(model, global_every=1)
    assert torch.equal(job(patched), job(model)) and set(facts(patched, NAME)["declined"]) == {"a global block"}


@pytest.mark.parametrize("name", ["wan_meta", "flux"])
def test_any_size_and_nothing_of_another_stays(name):
    model, spec = model_of(name)
    patched, job = window(model), Job(spec, steps=2)
    first = job(patched)
    channels, frames = spec.latent[1], (3,) * (len(spec.latent) == 5)
    for h, w in ((10, 6), (9, 15), (2, 22)):
        odd = Job(spec, steps=2, latent=torch.zeros(1, channels, *frames, h, w))
        got = odd(patched)
        assert got.shape[-2:] == (h, w) and error(got, odd(explicit(model))) < 1e-4
    assert torch.equal(job(patched), first)


def test_interrupted_then_again():
    model, spec = model_of("flux")
    patched = window(model)
    want = Job(spec, steps=3)(patched)

    def stop(step):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        Job(spec, steps=3, on_step=stop)(patched)
    assert torch.equal(Job(spec, steps=3)(patched), want)


def test_beside_a_cache_a_lora_and_another_attention():
    model, spec = model_of("flux")
    job = Job(spec)
    assert torch.equal(job(taylor(window(model))), job(window(taylor(model))))
    assert error(job(taylor(window(model))), job(taylor(explicit(model)))) < 1e-4
    key = "diffusion_model.double_blocks.0.img_mlp.0.weight"
    changed = model.clone()
    changed.add_patches({key: ("diff", (torch.randn(model.model_state_dict()[key].shape) * 0.2,))}, 1.0)
    assert error(job(window(changed)), job(explicit(changed))) < 1e-4
    both = run_node(
        LocalWindowAttention, model=window(model, blocks="0-1", global_every=0), radius=2, min_tokens=0, blocks="2-3"
    )[0]
    job(both)
    assert facts(both, NAME)["served"] == facts(both, "Local Window Attention")["served"] == 16


def test_a_foreign_override_underneath_keeps_the_other_blocks():
    from attention_helper import Foreign

    model, spec = model_of("flux")
    foreign = Foreign(model, 0.5)
    patched = window(foreign.onto(model), blocks="0", global_every=0)
    with foreign.counting():
        got = Job(spec, steps=2, cfg=1.0)(patched)
    assert foreign.image == 2 * 3 and facts(patched, NAME)["served"] == 2
    assert error(got, Job(spec, steps=2, cfg=1.0)(window(model, blocks="0", global_every=0))) > 1e-4


def test_a_model_that_cannot_be_served_says_so():
    model, spec = model_of("hunyuan3d2")
    with pytest.raises(ValueError, match="without places"):
        window(model)
    job = Job(spec, steps=1)
    assert torch.equal(job(window(model, unsupported="warn")), job(model))
