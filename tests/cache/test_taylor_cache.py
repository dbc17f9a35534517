"""Taylor Cache as a node, on stock models: off is off, and everything a run leaves behind is its picture."""

import pytest
import torch
from nodes_helper import Job, error, facts, kinds, model_of, taylor, watching

from tessera.patching.report import latest_record

CASES = [
    ("flux", "fp32"), ("flux", "bf16"), ("wan_meta", "fp32"), ("wan_meta", "bf16"), ("sd3", "fp32"),
    ("ltxv_meta", "fp32"), ("lumina2", "fp32"), ("cosmos_predict2", "fp32"),
]  # fmt: skip
LEVELS = ("last_block", "output")
EVERY = pytest.mark.parametrize(
    "name, dtype, level", [(n, d, level) for n, d in CASES for level in LEVELS], ids=lambda v: v
)
LEVEL = pytest.mark.parametrize("level", LEVELS)


@EVERY
def test_interval_1_is_bit_equal_with_the_hooks_firing(name, dtype, level):
    model, spec = model_of(name, dtype)
    job = Job(spec)
    with watching(model) as plain:
        want = job(model)
    patched = taylor(model, level=level, interval=1)
    with watching(model) as watch:
        got = job(patched)
    assert torch.equal(got, want) and torch.isfinite(got).all()
    assert watch.each == plain.each and plain.blocks > 0
    assert facts(patched)["blocks_computed"] == watch.blocks and facts(patched)["blocks_skipped"] == 0
    assert facts(patched)["full"] == 8 and facts(patched)["peak_bytes"] == 0  # off stores nothing
    assert torch.equal(job(model), want)


@EVERY
def test_reported_blocks_are_those_that_ran(name, dtype, level):
    model, spec = model_of(name, dtype)
    job, patched = Job(spec), taylor(model, level=level)
    with watching(model) as plain:
        want = job(model)
    with watching(model) as watch:
        got = job(patched)
    assert kinds(patched) == "ffppfppf"
    assert watch.each == [n // 2 for n in plain.each]  # 4 of 8 evaluations
    assert facts(patched)["blocks_computed"] == watch.blocks
    assert facts(patched)["blocks_skipped"] == plain.blocks - watch.blocks
    assert 1e-5 < error(got, want) < 0.8
    assert torch.equal(job(patched), got)
    assert torch.equal(job(model), want)


@LEVEL
@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_sde", "euler_ancestral", "dpmpp_2m", "uni_pc", "lcm"])
def test_samplers(sampler, level):
    model, spec = model_of("flux")
    job = Job(spec, sampler=sampler, steps=10)
    with watching(model) as plain:
        job(model)
    patched = taylor(model, level=level)
    with watching(model) as watch:
        got = job(patched)
    assert torch.isfinite(got).all()
    assert facts(patched)["forecast"] >= 3 and watch.blocks < plain.blocks
    assert facts(patched)["blocks_computed"] == watch.blocks
    assert facts(patched)["blocks_skipped"] == plain.blocks - watch.blocks
    assert torch.equal(job(patched), got)


@LEVEL
def test_whole_steps_are_skipped(level):
    model, spec = model_of("flux")
    patched = taylor(model, level=level, multi_eval="skip_whole_steps")
    Job(spec, sampler="heun")(patched)
    steps: dict[int, set] = {}
    for d in facts(patched)["decisions"]:
        steps.setdefault(d["step"], set()).add(d["kind"])
    assert sorted(steps) == list(range(8))
    assert all(len(seen) == 1 for seen in steps.values())
    assert {"forecast"} in steps.values()


@LEVEL
def test_a_restart_begins_a_new_history(level):
    model, spec = model_of("flux")
    sigmas = torch.tensor([1.0, 0.8, 0.6, 0.45, 0.3, 0.2, 0.7, 0.6, 0.5, 0.35, 0.2, 0.1, 0.0])
    patched = taylor(model, level=level, interval=4, warmup=2)
    got = Job(spec, steps=12, sigmas=sigmas)(patched)
    assert torch.isfinite(got).all()
    assert kinds(patched) == "ffpppfffpppf"  # warm-up is counted again from the noisier sigma on


@LEVEL
def test_partial_denoise(level):
    model, spec = model_of("flux")
    latent = torch.randn(spec.latent, generator=torch.Generator().manual_seed(3))
    job = Job(spec, steps=8, denoise=0.4, latent=latent)
    off, on = taylor(model, level=level, interval=1), taylor(model, level=level)
    assert torch.equal(job(off), job(model))
    assert torch.isfinite(job(on)).all() and kinds(on) == "ffppfppf"
    assert facts(on)["decisions"][0]["sigma"] < 0.75


@LEVEL
def test_percent_range_keeps_the_rest_exact(level):
    model, spec = model_of("flux")
    patched = taylor(model, level=level, interval=8, warmup=1, tail_full=0, start_percent=0.45, end_percent=0.75)
    Job(spec, steps=10)(patched)
    sampling = model.get_model_object("model_sampling")
    start, end = sampling.percent_to_sigma(0.45), sampling.percent_to_sigma(0.75)
    for d in facts(patched)["decisions"]:
        assert d["kind"] == ("forecast" if end <= d["sigma"] <= start else "full")
    assert facts(patched)["forecast"] > 0


@LEVEL
def test_inpainting(level):
    model, spec = model_of("flux")
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(spec.latent, generator=generator)
    mask = torch.zeros(1, 1, *spec.latent[-2:])
    mask[..., :6] = 1
    job = Job(spec, latent=latent, mask=mask)
    patched = taylor(model, level=level)
    got = job(patched)
    assert torch.equal(job(taylor(model, level=level, interval=1)), job(model))
    assert error(got[..., 6:], latent[..., 6:]) < 1e-5 and torch.isfinite(got).all()
    assert kinds(patched) == "ffppfppf"


@LEVEL
@pytest.mark.parametrize("basis, order", [("taylor_paper", 0), ("taylor_paper", 2), ("newton", 2), ("newton", 1)])
@pytest.mark.parametrize("variable", ["step", "sigma"])
def test_forms_of_the_forecast(basis, order, variable, level):
    model, spec = model_of("flux")
    patched = taylor(model, level=level, basis=basis, order=order, variable=variable)
    assert torch.isfinite(Job(spec)(patched)).all() and kinds(patched) == "ffppfppf"


@LEVEL
def test_cache_dtype_and_device(level):
    model, spec = model_of("flux")
    job = Job(spec)
    full, half = taylor(model, level=level), taylor(model, level=level, cache_dtype="bfloat16", cache_device="cpu")
    assert 0 < error(job(half), job(full)) < 0.05
    assert facts(half)["peak_bytes"] * 2 == facts(full)["peak_bytes"]


def test_more_evaluations_cost_less_quality():
    """The forecast is of the right thing: the closer the computed evaluations, the closer the picture."""
    model, spec = model_of("wan_meta")
    job = Job(spec, steps=24, cfg=1.0)
    want = job(model)
    for level in LEVELS:
        errors = [error(job(taylor(model, level=level, interval=n, warmup=3)), want) for n in (2, 4, 12)]
        assert errors[0] < errors[1] < errors[2]


def test_unknown_blocks_are_refused_or_logged(caplog):
    model, spec = model_of("flux")
    kind = type("Flux", (type(model.model.diffusion_model),), {"__module__": "another_pack.flux"})
    before = type(model.model.diffusion_model)
    model.model.diffusion_model.__class__ = kind
    try:
        with pytest.raises(ValueError, match="does not know the blocks of Flux. Use level=output"):
            taylor(model)
        warned = taylor(model, unsupported="warn")
        assert "does not know the blocks" in caplog.text
        assert torch.equal(Job(spec)(warned), Job(spec)(model))
        output = taylor(model, level="output")
        Job(spec)(output)
        assert facts(output)["forecast"] == 4 and not latest_record(output)["known"]
    finally:
        model.model.diffusion_model.__class__ = before


@pytest.mark.parametrize(
    "inputs, sentence",
    [
        ({"start_percent": 0.6, "end_percent": 0.4}, "start_percent 0.6 must not lie after end_percent 0.4"),
        ({"basis": "newton", "order": 3, "interval": 5}, "diverge at interval 5"),
    ],
)  # fmt: skip
def test_bad_input(inputs, sentence):
    with pytest.raises(ValueError, match=sentence):
        taylor(model_of("flux")[0], **inputs)
