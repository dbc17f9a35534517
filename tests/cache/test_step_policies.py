"""What each policy of Step Cache computes, stores and fills in, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch
from nodes_helper import error, model_of, run_node, watching
from step_helper import CALIBRATION, ON, REST, STEPS, constant, job_of, kinds, plain, step, told

from tessera.methods.cache.cadence import Cadence
from tessera.methods.cache.profile import Profile
from tessera.methods.cache.schedule import Schedule
from tessera.nodes.cache.step_cache import StepCache
from tessera.patching.cache_state import CacheState
from tessera.patching.report import latest_record


@pytest.mark.parametrize("policy, ends", [("FBCache", {}), ("DBCache", {"first_blocks": 1, "last_blocks": 1}),
                                          ("DBCache", {"first_blocks": 1, "last_blocks": 2})])  # fmt: skip
def test_a_residual_that_is_constant_is_filled_in_exactly(policy, ends):
    """From the double into the single blocks, with the text that later blocks read."""
    model, spec = model_of("flux")
    rest = constant(model, REST[: len(REST) - ends.get("last_blocks", 0)])
    patched = step(rest, policy, threshold=1.99, **ends)
    want, got = job_of(spec)(rest), job_of(spec)(patched)
    assert kinds(patched).count("s") >= 2 and error(got, want) < 1e-5
    assert error(job_of(spec)(step(rest, policy, threshold=1.99, **ends, fill="reuse")), want) > 1e-3


@pytest.mark.parametrize("first, last", [(2, 1), (3, 0), (1, 2)])
def test_dbcache_runs_its_first_and_last_blocks(first, last):
    model, spec = model_of("flux")
    patched = step(model, "DBCache", first_blocks=first, last_blocks=last)
    with watching(model) as watch:
        assert torch.isfinite(job_of(spec)(patched)).all()
    full = kinds(patched).count("f")
    assert full < STEPS
    assert watch.each == [STEPS if n < first or n >= 4 - last else full for n in range(4)]


@pytest.mark.parametrize("name", ["flux", "wan_meta"])
def test_pab_reuses_attention_and_nothing_else(name):
    """q, k and v are still computed; a foreign override underneath sees what is left."""
    model, spec = model_of(name)
    seen = []
    under = model.clone()
    under.model_options["transformer_options"] = {
        **under.model_options.get("transformer_options", {}),
        "optimized_attention_override": lambda func, *args, **kwargs: seen.append(1) or func(*args, **kwargs),
    }
    job_of(spec)(under)
    every = len(seen)
    seen.clear()
    patched = step(under, "PAB")
    job_of(spec)(patched)
    inside = told(patched)["attention_computed"] + told(patched)["attention_reused"]
    assert len(seen) == every - told(patched)["attention_reused"] and inside <= every
    # of evaluations 0 to 5, self-attention is reused at 2 and 3, cross-attention at 2 and 4
    assert told(patched)["attention_reused"] == {"flux": 4 * 2, "wan_meta": 3 * 2 + 3 * 2}[name]
    alone = step(model, "PAB", interval=1)
    job_of(spec)(alone)
    assert told(alone)["attention_reused"] == (0 if name == "flux" else 3 * 2)


def test_pab_in_its_window():
    model, spec = model_of("flux")
    patched = step(model, "PAB", interval=8, start_percent=0.45, end_percent=0.75, tail_full=0, warmup=1)
    job_of(spec, steps=10)(patched)
    sampling = model.get_model_object("model_sampling")
    start, end = sampling.percent_to_sigma(0.45), sampling.percent_to_sigma(0.75)
    assert all((d["kind"] == "reuse") == (end <= d["sigma"] <= start) for d in told(patched)["decisions"])
    assert "s" in kinds(patched)


def test_where_the_polynomial_comes_from():
    model, spec = model_of("flux")
    fitted = SimpleNamespace(tea_coefficients=(0.0, 0.0, 0.0, 2.0, 0.0), mag_ratios=(1.0,))
    errors = {}
    for source, inputs in {
        "FLUX.1": {"coefficients": "auto"},
        "the calibration": {"coefficients": "auto", "calibration": fitted},
        "the node": {"coefficients": "1 0", "calibration": fitted},
    }.items():
        patched = step(model, "TeaCache", threshold=0.01, **inputs)
        job_of(spec)(patched)
        assert told(patched)["coefficients"] == source and source in latest_record(patched)["features"][0]["line"]
        errors[source] = told(patched)["decisions"][1]["error"]
    assert errors["the calibration"] == pytest.approx(2 * errors["the node"], rel=1e-4)
    change = errors["the node"]
    published = sum(c * change**p for c, p in zip((498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
                                                  (4, 3, 2, 1, 0), strict=True))  # fmt: skip
    assert errors["FLUX.1"] == pytest.approx(abs(published), rel=1e-3)


REFUSED = [
    ("aura", {"policy": "TeaCache"}, "not known for AuraFlow. Use policy FBCache"),
    ("sd3", {"policy": "TeaCache"}, "no published polynomial for this Stable Diffusion 3. Connect"),
    ("flux2", {"policy": "TeaCache"}, "no published polynomial for this Flux. Connect Calibrate Cache"),
    ("flux", {"policy": "TeaCache", "coefficients": "one"}, "highest power first"),
    ("flux", {"policy": "FBCache", "level": "output"}, "cannot act at level output. Set level to auto"),
    ("flux", {"policy": "EasyCache", "level": "last_block"}, "Set level to auto or output"),
    ("flux", {"policy": "MagCache"}, "needs the ratios of a plain run: connect Calibrate Cache"),
    ("flux", {"policy": "DBCache", "first_blocks": 3, "last_blocks": 1}, "leaves none of this model's 4 to skip"),
]  # fmt: skip


@pytest.mark.parametrize("name, inputs, sentence", REFUSED)
def test_what_cannot_be_is_refused_with_a_sentence(name, inputs, sentence):
    with pytest.raises(ValueError, match=sentence):
        run_node(StepCache, model=model_of(name)[0], **inputs)


@pytest.mark.parametrize("policy", ON)
def test_unknown_models(policy, caplog):
    """What needs no blocks acts on the whole model; the others refuse, or say that they do nothing."""
    want = plain("flux", "fp32")[0]
    model, spec = model_of("flux")
    before = type(model.model.diffusion_model)
    model.model.diffusion_model.__class__ = type("Flux", (before,), {"__module__": "another_pack.flux"})
    try:
        if policy in ("EasyCache", "FORA", "MagCache"):
            patched = step(model, policy)
            job_of(spec)(patched)
            assert "s" in kinds(patched) and not latest_record(patched)["known"]
            return
        with pytest.raises(ValueError, match="Use policy"):
            step(model, policy)
        assert torch.equal(job_of(spec)(step(model, policy, unsupported="warn")), want)
        assert "does nothing on this MODEL" in caplog.text
    finally:
        model.model.diffusion_model.__class__ = before


def test_typed_coefficients_serve_where_nothing_was_published():
    model, spec = model_of("flux2")
    patched = step(model, "TeaCache", threshold=9.0)
    assert torch.isfinite(job_of(spec)(patched)).all() and "s" in kinds(patched)


def test_a_calibration_of_another_model_is_told(caplog):
    model, spec = model_of("flux")
    other = SimpleNamespace(**{**vars(CALIBRATION), "model": "0" * 16})
    job_of(spec)(step(model, "MagCache", calibration=other))
    assert "recorded on another model" in caplog.text


def test_a_schedule_replaces_the_gate_and_a_profile_the_settings():
    model, spec = model_of("flux")
    patched = step(model, "DBCache", threshold=0.0)
    job_of(spec)(patched)
    sigmas = tuple(d["sigma"] for d in told(patched)["decisions"])
    schedule = Schedule((True, False, True, False, False, True), sigmas)
    scheduled = step(model, "DBCache", schedule=schedule)
    job_of(spec)(scheduled)
    assert kinds(scheduled) == "fsfssf"
    profile = Profile("Step Cache", {"threshold": 1.5})
    profiled = step(model, "DBCache", threshold=0.0, profile=profile)
    assert torch.equal(job_of(spec)(profiled), job_of(spec)(step(model, "DBCache")))


def test_one_computed_call_makes_the_evaluation_a_computed_one():
    """Of two prompts that run apart one begins late: it is computed where the other one is skipped."""
    state = CacheState(Cadence(4), lambda: None, "step", None, kind="reuse")
    state.decisions.append({"kind": "full"})
    for skipped, kind in ((True, "reuse"), (False, "full"), (True, "full")):
        state.mark(skipped)
        assert state.decisions[-1]["kind"] == kind


def test_a_schedule_of_other_noise_levels_is_refused():
    model, spec = model_of("flux")
    for sigmas, words in (
        ((14.6, 5.0, 1.0, 0.1), "starts at sigma 14.6"),
        ((0.5, 0.4, 0.2, 0.1), "starts at sigma 0.5"),
    ):
        schedule = Schedule((True, False, True, True), sigmas)
        with pytest.raises(ValueError, match=words):
            job_of(spec)(step(model, "FORA", schedule=schedule))


@pytest.mark.parametrize("text", ["nan", "1e400", "1, inf"])
def test_coefficients_are_finite(text):
    with pytest.raises(ValueError, match="finite numbers"):
        step(model_of("flux")[0], "TeaCache", coefficients=text)
