"""Step Cache beside an attention node, LoRA, a ControlNet, context windows and other caches."""

import comfy_extras.nodes_context_windows as windows
import comfy_extras.nodes_easycache as easycache
import pytest
import torch
from comfy.controlnet import ControlBase
from nodes_helper import error, facts, model_of, run_node, taylor
from step_helper import REST, STEPS, constant, job_of, kinds, step
from tiny_models import conds

from tessera.nodes.attention.local_window_attention import LocalWindowAttention


@pytest.mark.parametrize("policy", ["FBCache", "TeaCache", "PAB"])
@pytest.mark.parametrize("first", [False, True])
def test_beside_an_attention_node_in_both_orders(policy, first):
    model, spec = model_of("wan_meta")
    narrow = {"radius": 1, "temporal_radius": 1, "min_tokens": 0}
    window = lambda m: run_node(LocalWindowAttention, model=m, **narrow)[0]  # noqa: E731
    patched = step(window(model), policy) if first else window(step(model, policy))
    got, other = job_of(spec)(patched), window(step(model, policy))
    served = facts(patched, "Local Window Attention")
    assert torch.equal(job_of(spec)(other), got) and "s" in kinds(patched)
    assert served["served"] == served["calls"] > 0  # the calls that are left are told apart as ever
    if policy == "PAB":
        assert served["calls"] == 3 * STEPS - 3 * 2  # self-attention was reused at two evaluations


def test_beside_lora():
    model, spec = model_of("flux")
    key = "diffusion_model.double_blocks.0.img_mlp.0.weight"
    change = torch.randn(model.model_state_dict()[key].shape, generator=torch.Generator().manual_seed(4)) * 0.2

    def lora(m):
        m = m.clone()
        assert m.add_patches({key: ("diff", (change,))}, 1.0) == [key]
        return m

    want = job_of(spec)(lora(model))
    for policy in ("FBCache", "TeaCache"):
        assert torch.equal(job_of(spec)(lora(step(model, policy, threshold=0.0))), want)
        after, before = lora(step(model, policy)), step(lora(model), policy)
        assert (
            torch.equal(job_of(spec)(after), job_of(spec)(before))
            and "s" in kinds(after)
            and kinds(after) == kinds(before)
        )


class Control(ControlBase):
    """The same residuals at every step. Core adds them in place to what blocks return."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        generator = torch.Generator().manual_seed(6)
        return {k: [torch.randn(1, 24, 128, generator=generator) for _ in range(2)] for k in ("input", "output")}


@pytest.mark.parametrize("policy", ["FBCache", "EasyCache", "PAB"])
def test_beside_a_controlnet(policy):
    model, spec = model_of("flux")
    positive, negative = ([[c, {**extra, "control": Control()}]] for ((c, extra),) in conds(spec))
    job = job_of(spec, positive=positive, negative=negative)
    rest = constant(model, REST)
    want = job(rest)
    assert torch.equal(job(step(rest, policy, threshold=0.0)), want)
    patched = step(rest, policy)
    got = job(patched)
    assert "s" in kinds(patched) and torch.isfinite(got).all()
    if policy == "FBCache":  # residuals of blocks that are skipped are part of what is stored, each once
        assert error(got, want) < 1e-5
    exact = step(rest, policy, cache_with_control=False)
    assert torch.equal(job(exact), want) and kinds(exact) == "f" * STEPS


def test_beside_context_windows():
    model, spec = model_of("wan_meta")
    noise = torch.randn(1, 16, 8, 4, 6, generator=torch.Generator().manual_seed(3))
    job = job_of(spec, noise=noise, latent=torch.zeros_like(noise))
    for policy in ("DBCache", "EasyCache", "PAB"):
        settings = {"context_length": 4, "context_overlap": 0, "dim": 2, "causal_window_fix": False}
        cut = run_node(windows.ContextWindowsManualNode, model=step(model, policy), **settings)[0]
        together = job(cut)
        assert "s" in kinds(cut)
        if policy == "PAB":  # counted: both windows decide as clips of their own
            halves = [
                job_of(spec, noise=n, latent=torch.zeros_like(n))(step(model, policy)) for n in noise.chunk(2, dim=2)
            ]
            assert error(together, torch.cat(halves, dim=2)) < 1e-4
        else:
            assert torch.isfinite(together).all()


def test_two_caches_and_cores_easycache_are_refused():
    model, spec = model_of("flux")
    for policy in ("FBCache", "PAB"):
        with pytest.raises(ValueError, match="already: two caches"):
            taylor(step(model, policy))
        both = run_node(easycache.EasyCacheNode, model=step(model, policy))[0]
        with pytest.raises(ValueError, match="core's EasyCache"):
            job_of(spec)(both)
