"""RF Edit: which features are put back where, told from outside, and what does not fit is refused."""

import pytest
import torch
from comfy_extras.nodes_custom_sampler import Noise_EmptyNoise
from flow_helper import digits, guider_of, run, sample, schedule, word
from nodes_helper import conds, error, facts, model_of, run_node, taylor

from tessera.methods.sampling.feature_bank import Bank, mixed
from tessera.nodes.attention.diagonal_attention import DiagonalAttention
from tessera.nodes.cache.region_adaptive_sampling import RegionAdaptiveSampling
from tessera.nodes.sampling.rf_edit import RfEdit
from tessera.nodes.sampling.rf_invert import RfInvert
from tessera.nodes.sampling.rf_solver_sampler import RfSolverSampler

STEPS = 4
SIGMAS = schedule(STEPS, 0.5)


def source(spec):
    return torch.randn(spec.latent, generator=torch.Generator().manual_seed(3))


def record(model, spec, sigmas=SIGMAS, **rest):
    """(noise, bank)"""
    rest = {"record_steps": 2, "record_blocks": "all", **rest}
    out = run_node(
        RfInvert, model=model, positive=conds(spec)[0], latent={"samples": source(spec)}, sigmas=sigmas, **rest
    )
    return out[0], out[1]


def edit(model, bank, **rest):
    return run_node(RfEdit, model=model, bank=bank, **{"inject_steps": 2, **rest})[0]


def sampled(model, spec, noise, positive=None, cfg=3.0, sigmas=SIGMAS):
    mine, negative = conds(spec, 5)
    solver = run_node(RfSolverSampler)[0]
    guider = guider_of(model, mine if positive is None else positive, negative, cfg)
    return sample(guider, solver, sigmas, source(spec), noise=noise)


@pytest.mark.parametrize("what", ["v", "k", "kv", "attn_out"])
def test_off_is_the_plain_model_with_its_hooks_firing(what):
    model, spec = model_of("flux")
    noise, bank = record(model, spec, record=what)
    want = sampled(model, spec, noise)
    for off in ({"inject_steps": 0}, {"strength": 0.0}):
        assert torch.equal(sampled(edit(model, bank, **off), spec, noise), want)
    assert error(sampled(edit(model, bank), spec, noise), want) > 1e-4


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "lumina2"])
def test_recording_does_not_change_the_inversion_and_edits_act_where_told(name):
    model, spec = model_of(name)
    noise, bank = record(model, spec)
    assert torch.equal(noise.x, record(model, spec, record_steps=0)[0].x)
    edited = edit(model, bank)
    assert sampled(edited, spec, noise).isfinite().all()
    told = facts(edited, "RF Edit")
    assert told["steps"] == 2 and told["calls"] % (4 * len(bank.kept)) == 0 and told["calls"] > 0


def test_the_source_prompt_reproduces_the_path_of_the_inversion():
    """With the features of the same path nearly nothing changes, and less the finer the steps are."""
    model, spec = model_of("flux")
    changes = []
    for steps in (3, 6):
        sigmas = schedule(steps, 0.1)
        noise, bank = record(model, spec, sigmas, record_steps=steps)
        plain = sampled(model, spec, noise, conds(spec)[0], 1.0, sigmas)
        changes.append(
            error(sampled(edit(model, bank, inject_steps=steps), spec, noise, conds(spec)[0], 1.0, sigmas), plain)
        )
    assert changes[0] < 0.02 and changes[1] < changes[0] * 0.75, changes


def test_the_edited_digit_stays_nearer_to_its_source():
    solver, empty, sigmas = run_node(RfSolverSampler)[0], torch.zeros(1, 16, 16, 16), schedule(10)
    seven = sample(guider_of(digits(), word("seven")), solver, sigmas, empty)
    out = run_node(RfInvert, model=digits(), positive=word("seven"), latent={"samples": seven}, sigmas=sigmas,
                   record_steps=6, record_blocks="all")  # fmt: skip
    far = [
        error(sample(guider_of(m, word("three"), word(""), 2.0), solver, sigmas, seven, noise=out[0]), seven)
        for m in (digits(), edit(digits(), out[1], inject_steps=6))
    ]
    assert far[1] < 0.9 * far[0], far


def test_values_reach_attention_and_nothing_else():
    """The values that the last block attends with are the bank's for the chosen prompts, and its own elsewhere."""
    model, spec = model_of("flux")
    noise, bank = record(model, spec, record_blocks="2")
    seen = []

    def spy(func, *args, **kwargs):
        options = kwargs["transformer_options"]
        if (options.get("block_type"), options.get("block_index")) == ("single", 0):
            seen.append((args[2].clone(), list(options["cond_or_uncond"])))
        return func(*args, **kwargs)

    for prompts in ("both", "positive"):
        seen.clear()
        spied = model.clone()
        spied.model_options["transformer_options"]["optimized_attention_override"] = spy
        sampled(edit(spied, bank, prompts=prompts), spec, noise)
        assert set(bank.kept) == {(2, 0)} and len(seen) == 2 * STEPS
        series = sorted(bank.kept[2, 0], reverse=True)
        assert len(series) == 4  # the start of each of two steps and its middle
        for n, (values, roles) in enumerate(seen):
            for role, rows in zip(roles, values.chunk(len(roles)), strict=True):
                held = [torch.equal(rows, bank.kept[2, 0][s][0][0]) for s in series]
                assert held == [n == i and (role == 0 or prompts == "both") for i in range(4)]


def test_batch_rows_share_one_source_or_have_their_own():
    model, spec = model_of("flux")
    noise, bank = record(model, spec)
    edited = edit(model, bank)
    two = run(edited, spec, run_node(RfSolverSampler)[0], SIGMAS, latent=torch.cat([source(spec)] * 2), noise=noise)
    one = run(edited, spec, run_node(RfSolverSampler)[0], SIGMAS, latent=source(spec), noise=noise)
    assert error(two, torch.cat([one] * 2)) < 1e-5


@pytest.mark.parametrize("other", ["taylor", "diagonal"])
def test_beside_caches_and_attention(other):
    model, spec = model_of("flux")
    noise, bank = record(model, spec)

    def beside(m):
        return (
            taylor(m, interval=2, warmup=1)
            if other == "taylor"
            else run_node(DiagonalAttention, model=m, min_tokens=0)[0]
        )

    for both in (beside(edit(model, bank)), edit(beside(model), bank)):
        out = sampled(both, spec, noise)
        assert facts(both, "RF Edit")["calls"] > 0 and torch.equal(out, sampled(both, spec, noise))
        assert error(out, sampled(beside(model), spec, noise)) > 1e-4


def test_float8_bank_is_near_and_a_half_as_large():
    model, spec = model_of("flux", "bf16")
    noise, bank = record(model, spec)
    _, small = record(model, spec, record_dtype="float8")
    assert abs(small.bytes_held * 2 - bank.bytes_held) < 100 * 32
    change = error(sampled(edit(model, small), spec, noise), sampled(edit(model, bank), spec, noise))
    assert 0 < change < error(sampled(model, spec, noise), sampled(edit(model, bank), spec, noise))


def test_other_schedules_are_refused():
    model, spec = model_of("flux")
    noise, bank = record(model, spec)
    with pytest.raises(ValueError, match="Give both the same sigmas"):
        sampled(edit(model, bank), spec, noise, sigmas=schedule(STEPS, 0.6))


@pytest.mark.parametrize("cut", [1, 3])
def test_two_samplers_in_turn_share_what_one_would(cut):
    model, spec = model_of("flux")
    noise, bank = record(model, spec)
    edited = edit(model, bank)
    want = sampled(edited, spec, noise)
    guider, solver = guider_of(edited, *conds(spec, 5), 3.0), run_node(RfSolverSampler)[0]
    half = sample(guider, solver, SIGMAS[: cut + 1], source(spec), noise=noise)
    out = sample(guider, solver, SIGMAS[cut:], half, noise=Noise_EmptyNoise())
    assert facts(edited, "RF Edit")["steps"] == max(0, 2 - cut) and error(out, want) < 1e-5
    with pytest.raises(ValueError, match="Give both the same sigmas"):
        sample(guider, solver, torch.tensor([0.375, 0.2, 0.0]), half)


def test_other_sizes_and_prompts_of_other_lengths_are_refused():
    model, spec = model_of("flux")
    noise, bank = record(model, spec)
    solver = run_node(RfSolverSampler)[0]
    with pytest.raises(ValueError, match="tokens here and had"):
        run(edit(model, bank), spec, solver, SIGMAS, latent=torch.randn(1, 16, 8, 16))
    with pytest.raises(ValueError, match="features of 1 latents|features of 2 latents"):
        double = Bank(bank.sigmas, bank.steps, images=bank.images,
                      kept={at: {s: ((torch.cat([e[0][0]] * 2), None),) for s, e in series.items()}
                            for at, series in bank.kept.items()})  # fmt: skip
        run(edit(model, double), spec, solver, SIGMAS, latent=torch.cat([source(spec)] * 3))


def test_more_steps_than_recorded_and_conflicts_are_refused():
    model, spec = model_of("flux")
    _, bank = record(model, spec)
    with pytest.raises(ValueError, match="inject_steps 3 are more than the 2 steps"):
        edit(model, bank, inject_steps=3)
    with pytest.raises(ValueError, match="Remove one of the two"):
        edit(edit(model, bank), bank)
    with pytest.raises(ValueError, match="Use one of them"):
        edit(run_node(RegionAdaptiveSampling, model=model)[0], bank)


def test_mixing():
    own, other = torch.randn(2, 3, 6, 4), torch.randn(1, 3, 6, 4)
    assert torch.equal(mixed(own, other, 1.0, 2, None), other.expand_as(own))
    part = mixed(own, other, 0.25, 2, slice(2, 5))
    assert torch.equal(part[:, :, :2], own[:, :, :2]) and torch.equal(part[:, :, 5:], own[:, :, 5:])
    torch.testing.assert_close(part[:, :, 2:5], 0.75 * own[:, :, 2:5] + 0.25 * other[:, :, 2:5])


def test_features_of_a_latent_turned_by_a_quarter_are_refused():
    """It has as many tokens, but in other places."""
    model, spec = model_of("flux")
    _, bank = record(model, spec)
    guider = guider_of(edit(model, bank), *conds(spec, 5), 1.0)
    turned = torch.zeros(spec.latent).transpose(2, 3)
    with pytest.raises(ValueError, match="1 x 6 x 4 tokens, and that of RF Invert had 1 x 4 x 6"):
        sample(guider, run_node(RfSolverSampler)[0], SIGMAS, turned, noise=Noise_EmptyNoise())


def test_features_of_another_model_are_refused():
    _, bank = record(*model_of("flux"))
    model, spec = model_of("sd3")
    with pytest.raises(ValueError, match="features of block 3, and this Stable Diffusion 3 has blocks 0 to 1"):
        edit(model, bank)
