"""Whose rows a call carries: joined or separate CFG, batches, regions, prompts that come and go. Decisions follow the
evaluation alone; histories follow the condition, never the row."""

import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from nodes_helper import Job, error, facts, kinds, model_of, taylor, watching
from tiny_models import conds

from tessera.patching.report import latest_record

CASES = [
    ("flux", "fp32"), ("flux", "bf16"), ("wan_meta", "fp32"), ("wan_meta", "bf16"), ("sd3", "fp32"),
    ("ltxv_meta", "fp32"), ("lumina2", "fp32"), ("cosmos", "fp32"),
]  # fmt: skip
LEVELS = ("last_block", "output")
LEVEL = pytest.mark.parametrize("level", LEVELS)
EVERY = pytest.mark.parametrize(
    "name, dtype, level", [(n, d, level) for n, d in CASES for level in LEVELS], ids=lambda v: v
)
NEAR = {"fp32": 1e-4, "bf16": 0.1}


class Memory:
    """As little as makes core run every condition in a call of its own, while `low`."""

    low = True


@pytest.fixture
def memory(monkeypatch):
    state, free = Memory(), comfy.model_patcher.ModelPatcher.get_free_memory
    monkeypatch.setattr(
        comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, d: 0 if state.low else free(self, d)
    )
    return state


def lengthened(spec, positive: int, negative: int):
    """Conditions with text of other lengths."""
    out = []
    for cond, length in zip(conds(spec), (positive, negative), strict=True):
        text, extra = cond[0]
        text = torch.randn(1, length, text.shape[-1], generator=torch.Generator().manual_seed(length))
        extra = {k: torch.ones(1, length, dtype=v.dtype) if k == "attention_mask" else v for k, v in extra.items()}
        out.append([[text, extra]])
    return out


def with_extra(cond, **extra):
    return [[text, {**given, **extra}] for text, given in cond]


@EVERY
def test_separate_cfg_decides_as_joined_cfg(name, dtype, level, memory):
    model, spec = model_of(name, dtype)
    patched, job = taylor(model, level=level), Job(spec)
    memory.low = False
    with watching(model) as joined_blocks:
        joined = job(patched)
    first, forwards = facts(patched), latest_record(patched)["forwards"]
    memory.low = True
    with watching(model) as watch:
        separate = job(patched)
    assert latest_record(patched)["forwards"] == 2 * forwards == 16
    assert facts(patched)["decisions"] == first["decisions"] and kinds(patched) == "ffppfppf"
    assert facts(patched)["blocks_computed"] == watch.blocks == 2 * joined_blocks.blocks
    assert error(separate, joined) < NEAR[dtype]


@EVERY
@pytest.mark.parametrize("begins_low", [False, True])
def test_memory_that_changes_within_a_run(name, dtype, level, begins_low, memory):
    model, spec = model_of(name, dtype)
    patched = taylor(model, level=level)
    memory.low = False
    want = Job(spec)(patched)

    def on_step(step):
        memory.low = (step >= 2) != begins_low

    memory.low = begins_low
    got = Job(spec, on_step=on_step)(patched)
    assert kinds(patched) == "ffppfppf"
    assert facts(patched)["blocks_skipped"] > 0
    assert error(got, want) < NEAR[dtype]


@EVERY
def test_a_batch_is_its_pictures(name, dtype, level):
    model, spec = model_of(name, dtype)
    patched = taylor(model, level=level)
    noises = [torch.randn(spec.latent, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    single = [Job(spec, noise=noise)(patched) for noise in noises]
    both = Job(spec, noise=torch.cat(noises), batch=2)(patched)
    assert kinds(patched) == "ffppfppf"
    assert error(both, torch.cat(single)) < NEAR[dtype]


@EVERY
def test_cfg_1(name, dtype, level):
    model, spec = model_of(name, dtype)
    job = Job(spec, cfg=1.0)
    assert torch.equal(job(taylor(model, level=level, interval=1)), job(model))
    patched = taylor(model, level=level)
    with watching(model) as watch:
        assert torch.isfinite(job(patched)).all()
    assert kinds(patched) == "ffppfppf" and facts(patched)["blocks_computed"] == watch.blocks
    assert latest_record(patched)["forwards"] == 8


def regions(spec, how: str):
    """Two positives for the two halves of the picture, and one plain negative."""
    one, negative = conds(spec)
    two, _ = conds(spec, seed=5)
    h, w = spec.latent[-2:]
    if how == "area":
        left, right = ({"area": (h, w // 2, 0, x), "strength": 1.0} for x in (0, w // 2))
    else:
        half = torch.zeros(1, h * 8, w * 8)
        half[..., : w * 4] = 1
        left, right = ({"mask": m, "mask_strength": 1.0, "set_area_to_bounds": False} for m in (half, 1 - half))
    return with_extra(one, **left) + with_extra(two, **right), negative


@LEVEL
@pytest.mark.parametrize("name", ["flux", "sd3", "lumina2"])
@pytest.mark.parametrize("how", ["area", "mask"])
@pytest.mark.parametrize("lengths", ["same", "different"])
def test_regional_prompts(name, level, how, lengths, memory):
    model, spec = model_of(name)
    positive, negative = regions(spec, how)
    if lengths == "different":
        negative = lengthened(spec, 15, 15)[1]
    job = Job(spec, positive=positive, negative=negative)
    off, on = taylor(model, level=level, interval=1), taylor(model, level=level)
    pictures = []
    for memory.low in (False, True):
        assert torch.equal(job(off), job(model))
        with watching(model) as watch:
            pictures.append(job(on))
        assert kinds(on) == "ffppfppf" and facts(on)["blocks_computed"] == watch.blocks > 0
        assert facts(on)["blocks_skipped"] == watch.blocks  # half of the evaluations, every stream of them
    if lengths == "same":
        assert error(pictures[1], pictures[0]) < 1e-4


@LEVEL
@pytest.mark.parametrize("how", ["area", "mask"])
def test_regions_when_memory_changes(level, how, memory):
    """Core lends the negative of a region its positive's id, and turns the order of conditions round when it joins them."""
    model, spec = model_of("flux")
    positive, negative = regions(spec, how)
    patched, pictures = taylor(model, level=level), []
    for changes in (False, True):
        memory.low = False

        def on_step(step, changes=changes):
            memory.low = changes and step % 3 == 1

        pictures.append(Job(spec, positive=positive, negative=negative, on_step=on_step)(patched))
        assert kinds(patched) == "ffppfppf"
    assert error(pictures[1], pictures[0]) < 1e-4


@LEVEL
def test_regions_do_not_see_each_other(level):
    """Swapping two equal-sized regions with their prompts must give what each had: histories follow the condition."""
    model, spec = model_of("flux")
    (one, two), negative = regions(spec, "area")
    patched = taylor(model, level=level)
    a = Job(spec, positive=[one, two], negative=negative)(patched)
    b = Job(spec, positive=[two, one], negative=negative)(patched)
    assert error(b, a) < 1e-4


@LEVEL
@pytest.mark.parametrize("name", ["flux", "wan_meta", "lumina2", "cogvideox"])
@pytest.mark.parametrize("lengths", [(10, 15), (5, 20), (7, 11)])
def test_prompts_of_other_lengths(name, level, lengths, memory):
    """Core runs them apart, but for some models (CogVideoX) repeats the shorter text up to the common multiple, if that
    is near: such a history must not serve a separate call, nor the other way round."""
    model, spec = model_of(name)
    positive, negative = lengthened(spec, *lengths)
    off, on = taylor(model, level=level, interval=1), taylor(model, level=level)

    def job(**more):
        memory.low = False
        return Job(spec, positive=positive, negative=negative, **more)

    def on_step(step):
        memory.low = step >= 2

    assert torch.equal(job()(off), job()(model))
    assert torch.equal(job(on_step=on_step)(off), job(on_step=on_step)(model))
    assert torch.isfinite(job()(on)).all() and kinds(on) == "ffppfppf"
    joined = latest_record(on)["forwards"] == 8
    assert joined == (name == "cogvideox" and lengths != (7, 11))
    with watching(model) as watch:
        assert torch.isfinite(job(on_step=on_step)(on)).all()
    assert facts(on)["blocks_computed"] == watch.blocks and facts(on)["blocks_skipped"] > 0
    grew = joined and level == "last_block"  # one or both were longer when joined, and are computed apart
    assert kinds(on) == ("ffpffppf" if grew else "ffppfppf")


@LEVEL
@pytest.mark.parametrize("low", [False, True], ids=["joined", "separate"])
def test_a_prompt_that_begins_late_is_computed_first(level, low, memory):
    """Its calls run where the others are forecast, and those that share a call with it run too."""
    model, spec = model_of("flux")
    memory.low = low
    early, negative = conds(spec)
    late, _ = conds(spec, seed=5)
    early = with_extra(early, start_percent=0.0, end_percent=0.3)
    late = with_extra(late, start_percent=0.3, end_percent=1.0)
    job = Job(spec, positive=early + late, negative=negative)
    assert torch.equal(job(taylor(model, level=level, interval=1)), job(model))
    patched = taylor(model, level=level, interval=8, warmup=1)
    with watching(model) as watch:
        got = job(patched)
    blocks = len(watch.each)
    assert torch.isfinite(got).all()
    if low:  # both at first, the late one when it begins, both at the end
        assert kinds(patched) == "fppfpppf" and watch.blocks == blocks * (2 + 1 + 2)
    else:
        assert kinds(patched).count("f") == 3 and watch.blocks == blocks * 3


class Stopping(comfy.samplers.CFGGuider):
    """Guidance that ends after the first evaluation, so that core drops the negatives."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        self.cfg = self.first if float(timestep.max()) > 0.99 else 1.0
        return super().predict_noise(x, timestep, model_options, seed)


def test_histories_when_guidance_stops():
    """Core lends the negative of a region its positive's id: with the negatives gone, each keeps its own history."""
    model, spec = model_of("flux")
    positive, negative = regions(spec, "area")
    flows, sigmas = [], torch.tensor([1.0, 0.7, 0.4, 0.0])
    for first in (1.0, 5.0):
        guider, seen = Stopping(taylor(model, level="output", order=0, interval=8, warmup=1, tail_full=0)), []
        guider.first = first
        guider.set_conds(positive, negative)
        noise = torch.randn(spec.latent, generator=torch.Generator().manual_seed(1))
        guider.sample(
            noise, torch.zeros(spec.latent), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True,
            callback=lambda step, x0, x, total, seen=seen: seen.append((x - x0) / sigmas[step]), seed=1,
        )  # fmt: skip
        flows.append(seen)
    (plain, *_), (guided, *after) = flows
    assert error(guided, plain) > 0.01  # the first evaluation was guided
    assert all(error(flow, plain) < 1e-4 for flow in after)  # the others reuse what the positives alone gave


def test_one_condition_used_twice_in_an_evaluation():
    """Guidance that runs the negative again (PAG, SLG, perp-neg) must not overwrite the first one's history."""
    model, spec = model_of("flux")

    def again(args):
        out = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], args["input"], args["sigma"], args["model_options"]
        )
        return args["denoised"] + 0.0 * out[0]

    model.set_model_sampler_post_cfg_function(again)
    patched = taylor(model)
    plain = Job(spec)(taylor(model_of("flux")[0]))
    with watching(model) as watch:
        assert torch.equal(Job(spec)(patched), plain)
    assert kinds(patched) == "ffppfppf" and facts(patched)["blocks_computed"] == watch.blocks
    assert latest_record(patched)["forwards"] == 16 and facts(patched)["blocks_skipped"] == watch.blocks
