"""Apply EasyControl beside attention plans, caches, quantized weights and LoRA."""

import pytest
import torch
from easycontrol_helper import forward
from easycontrol_nodes import NAME, applied, conditions, latent, network_calls
from nodes_helper import Job, error, facts, model_of, run_node, taylor, watching
from quantized_helper import folder, quantized  # noqa: F401 - a fixture

from tessera.methods.attention.call import Answer
from tessera.nodes.attention.sparse_linear_attention import SparseLinearAttention
from tessera.nodes.cache.dynamic_grain import DynamicGrain
from tessera.nodes.cache.dynamic_tokens import DynamicTokens
from tessera.nodes.cache.region_adaptive_sampling import RegionAdaptiveSampling
from tessera.nodes.cache.step_cache import StepCache
from tessera.nodes.control.in_context_panels import InContextPanels
from tessera.patching.attention import AttentionFeature
from tessera.patching.run import attach


class Whole:
    """Dense attention as a plan gets it: a query for every key, the picture's tokens where the layout says."""

    spatial = True

    def begin(self):
        return []

    def attend(self, state, call):
        layout = call.places()
        state.append(layout)
        bias = call.served_bias()
        mask = None if bias is None else bias[:, None, None].to(call.q.dtype)
        out = torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v, mask, scale=call.scale)
        return Answer(out, 1.0, 1.0)


def test_a_plan_that_turns_keys_back_is_told_all_rotations():
    model, spec = model_of("flux")
    told = []

    class Turning(Whole):
        wants_rotation = True

        def attend(self, state, call):
            told.append((call.forward.rotation.shape[2], call.k.shape[2]))
            return super().attend(state, call)

    both = applied(applied(model), 2)
    planned = attach(both, AttentionFeature(None, "Whole", method=Turning(), min_tokens=0))
    assert error(Job(spec, steps=1)(planned), Job(spec, steps=1)(both)) < 1e-5
    assert told == [(10 + 24 + 2 * 12,) * 2] * 4


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_plan_is_given_the_condition_as_tokens_like_text(strength):
    model, spec = model_of("flux")
    both = applied(applied(model, strength=strength), 2)
    planned = attach(both, AttentionFeature(None, "Whole", method=Whole(), min_tokens=0))
    with network_calls(model) as (calls, _):
        got = Job(spec, steps=2)(planned)
    told = facts(planned, "Whole")
    assert told["served"] == told["calls"] == 8 and not told["declined"]
    assert error(got, Job(spec, steps=2)(both)) < 1e-5


def test_a_sparse_plan_serves_beside_it():
    model, spec = model_of("flux")
    small = {"latent": torch.zeros(1, 16, 16, 16), "steps": 2}
    controlled = applied(model)
    half = run_node(SparseLinearAttention, model=controlled, topk=0.5, min_tokens=0, block_q="16", block_k="16")[0]
    assert 0 < error(Job(spec, **small)(half), Job(spec, **small)(controlled)) < 0.3
    told = facts(half, "Sparse-Linear Attention")
    assert told["served"] == told["calls"] and told["pairs_fraction"] < 1


@pytest.mark.parametrize("order", ["cache first", "control first"])
def test_a_cache_skips_beside_it(order):
    model, spec = model_of("flux")
    patched = applied(taylor(model)) if order == "cache first" else taylor(applied(model))
    with watching(patched) as watch:
        got = Job(spec, steps=8, cfg=1.0)(patched)
    full = Job(spec, steps=8, cfg=1.0)(applied(model))
    computed = sum(d["kind"] == "full" for d in facts(patched)["decisions"])
    assert computed < 8 and watch.each[0] == computed + 1
    assert 0 < error(got, full) < 0.5


@pytest.mark.parametrize("form", ["int8_row", "tlq4"])
def test_quantized_weights_are_as_good_beside_it(form, folder):  # noqa: F811
    model, spec = model_of("flux")
    job = Job(spec, steps=2)
    packed = quantized("flux", form)[1]
    lost = error(job(packed), job(model))
    assert lost > 0
    got, want = job(applied(packed)), job(applied(model))
    assert error(got, want) < 1.5 * lost + 1e-3
    assert error(got, job(packed)) > 1e-2
    assert torch.equal(got, job(applied(packed, cache="recompute")))


def test_a_lora_on_the_model_acts_on_the_condition_too():
    model, spec = model_of("flux")
    weights = {k: v.clone() for k, v in model.model.diffusion_model.state_dict().items()}
    weight = weights["single_blocks.0.linear1.weight"]
    patch = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) * 0.02
    loraed = model.clone()
    loraed.add_patches({"diffusion_model.single_blocks.0.linear1.weight": ("diff", (patch,))})
    patched = applied(loraed)
    with network_calls(patched) as (calls, _):
        Job(spec, steps=2, cfg=1.0)(patched)
    weight += patch

    class Merged:
        params = model.model.diffusion_model.params

        def state_dict(self):
            return weights

    for x, t, context, y, guidance, out in calls:
        want = forward(Merged(), x, t, context, y, guidance, conditions(model, {"samples": latent(), "seed": 1}))
        bare = forward(Merged(), x, t, context, y, guidance, [])
        assert error(out, want) < 1e-5 and error(out, bare) > 1e-2


def test_what_moves_or_leaves_out_tokens_is_refused():
    model, _ = model_of("flux")
    for other in (
        lambda m: run_node(RegionAdaptiveSampling, model=m)[0],
        lambda m: run_node(InContextPanels, model=m, latent={"samples": torch.zeros(1, 16, 8, 8)})[0],
    ):
        with pytest.raises(ValueError, match="Use one of them on a MODEL"):
            other(applied(model))
        with pytest.raises(ValueError, match="Use one of them on a MODEL"):
            applied(other(model))


@pytest.mark.parametrize("node", [DynamicGrain, DynamicTokens, StepCache])
def test_token_and_step_caches_run_beside_it(node):
    model, spec = model_of("flux")
    small = {"latent": torch.zeros(1, 16, 16, 16), "steps": 6, "cfg": 1.0}
    alone = Job(spec, **small)(applied(model))
    for patched in (run_node(node, model=applied(model))[0], applied(run_node(node, model=model)[0])):
        got = Job(spec, **small)(patched)
        assert torch.isfinite(got).all() and error(got, alone) < 0.7
        assert facts(patched, NAME)["served"] > 0


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("order", ["theirs first", "ours first"])
def test_another_packs_keys_and_mask_do_not_move_the_strength(order, strength):
    """Their patch adds 4 keys and masks the picture's queries and keys, which it finds in equal number."""
    model, spec = model_of("flux")
    seen, generator = set(), torch.Generator()

    def theirs(q, k, v, pe=None, attn_mask=None, extra_options=None, **unknown):
        seen.add((q.shape[2], k.shape[2]))
        more = torch.randn(1, k.shape[1], 4, k.shape[3], generator=generator.manual_seed(extra_options["block_index"]))
        more = more.expand(k.shape[0], -1, -1, -1)
        mask = torch.zeros(1, 1, q.shape[2], q.shape[2] + 4)
        mask[..., 3:9] = -4.0
        keys, values = torch.cat([k, more], 2), torch.cat([v, more], 2)
        return {"k": keys, "v": values, "pe": torch.cat([pe, pe[:, :, :4]], 2), "attn_mask": mask}

    def patched(strength):
        first = model.clone()
        if order == "theirs first":
            first.set_model_attn1_patch(theirs)
        last = applied(applied(first, strength=strength), 2)
        if order == "ours first":
            last.set_model_attn1_patch(theirs)
        return last

    biases = []

    def answer(func, q, k, v, heads, mask=None, **kwargs):
        biases.append(mask[..., -24:].amax((0, 1, 2)))
        return func(q, k, v, heads, mask=mask, **kwargs)

    told = patched(strength)
    told.model_options["transformer_options"]["optimized_attention_override"] = answer
    Job(spec, steps=1, cfg=1.0)(told)
    want = torch.tensor([strength] * 12 + [1.0] * 12).log()
    inside = [bias for bias in biases if bias.shape == want.shape]
    assert seen == {(34, 34)} and len(inside) == 4 and all(torch.allclose(bias, want) for bias in inside)
