"""Dynamic Grain beside other nodes, ControlNets and reference pictures, and what it refuses."""

import pytest
import torch
from comfy.controlnet import ControlBase
from nodes_helper import Job, error, facts, model_of, run_node, taylor
from tiny_models import conds

from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.nodes.cache.dynamic_grain import DynamicGrain
from tessera.nodes.cache.dynamic_tokens import DynamicTokens


def grain(model, **inputs):
    return run_node(DynamicGrain, model=model, **{"start_percent": 0.0, "end_percent": 1.0, **inputs})[0]


def told(model):
    return facts(model, "Dynamic Grain")


def kinds(model) -> str:
    return "".join(d["kind"][0] for d in told(model)["decisions"])


def test_a_cache_of_the_whole_model_is_refused_in_both_orders():
    model, spec = model_of("flux")
    for both in (
        lambda: grain(taylor(model, level="output")),
        lambda: taylor(grain(model), level="output"),
    ):
        with pytest.raises(ValueError, match="Set its level to last_block"):
            both()
    off = taylor(grain(model, coarse_fraction=0.3), level="output", interval=1)
    assert torch.isfinite(Job(spec)(off)).all()


@pytest.mark.parametrize("level", ["last_block", "block_residual"])
def test_beside_taylor_cache_in_both_orders(level):
    model, spec = model_of("flux")
    one, two = grain(taylor(model, level=level)), taylor(grain(model), level=level)
    got = Job(spec)(one)
    assert torch.equal(Job(spec)(two), got) and torch.isfinite(got).all()
    assert told(one)["merged"] > 0 and facts(one)["forecast"] == 4
    off = taylor(grain(model, coarse_fraction=0.0), level=level)
    assert torch.equal(Job(spec)(off), Job(spec)(taylor(model, level=level)))


def test_beside_an_attention_node_which_declines():
    model, spec = model_of("flux")
    window = {"radius": 2, "min_tokens": 0}
    one = run_node(LocalWindowAttention, model=grain(model), **window)[0]
    two = grain(run_node(LocalWindowAttention, model=model, **window)[0])
    got = Job(spec)(one)
    assert torch.equal(Job(spec)(two), got)
    assert facts(one, "Local Window Attention")["declined"] == {"token layout unknown": 7 * 4}


class Control(ControlBase):
    """Adds to the image stream between blocks."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        add = torch.randn(1, 24, 128, generator=torch.Generator().manual_seed(1)).to(x_noisy)
        return {"input": [add, None], "output": [add * 0.5]}

    def copy(self):
        return self


def test_a_controlnet_reaches_merged_tokens():
    model, spec = model_of("flux")
    positive, negative = ([[text, {**given, "control": Control()}] for text, given in cond] for cond in conds(spec))
    job = Job(spec, positive=positive, negative=negative)
    want, patched = job(model), grain(model, coarse_fraction=0.2)
    assert error(job(patched), want) < error(Job(spec)(patched), want) and kinds(patched) == "fmmmmmmm"


def test_refusals(caplog):
    flux, _ = model_of("flux")
    with pytest.raises(ValueError, match="Dynamic Grain is on this MODEL already"):
        grain(grain(flux))
    for both in (
        lambda: grain(run_node(DynamicTokens, model=flux)[0]),
        lambda: run_node(DynamicTokens, model=grain(flux)),
    ):
        with pytest.raises(
            ValueError, match="Dynamic Grain changes which tokens there are, and Dynamic Tokens remembers"
        ):
            both()
    for both in (lambda: grain(taylor(flux, level="module")), lambda: taylor(grain(flux), level="module")):
        with pytest.raises(ValueError, match="and Taylor Cache remembers them by their places"):
            both()
    for both in (
        lambda: run_node(DynamicTokens, model=taylor(flux, level="module")),
        lambda: taylor(run_node(DynamicTokens, model=flux)[0], level="module"),
    ):
        with pytest.raises(ValueError, match="at level module would both answer for MLPs. Set another level"):
            both()
    with pytest.raises(ValueError, match="there is no block 4"):
        grain(flux, blocks="4")
    other, spec = model_of("ltxv_meta")
    with pytest.raises(ValueError, match="does not know what else the blocks of LTX-Video hold for single tokens"):
        grain(other)
    warned = grain(other, unsupported="warn")
    assert torch.equal(Job(spec, steps=2)(warned), Job(spec, steps=2)(other)) and "does nothing" in caplog.text


def test_a_call_with_reference_pictures_is_left_whole():
    model, spec = model_of("flux")
    reference = {"reference_latents": [torch.randn(spec.latent, generator=torch.Generator().manual_seed(2))]}
    positive, negative = ([[text, {**given, **reference}] for text, given in cond] for cond in conds(spec))
    job, patched = Job(spec, steps=3, positive=positive, negative=negative), grain(model)
    assert torch.equal(job(patched), job(model))
    assert set(told(patched)["declined"]) == {"tokens beside the picture's own"}
