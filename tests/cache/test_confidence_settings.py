"""What each input of Confidence Taylor Cache does, on stock models."""

import pytest
import torch
from confidence_helper import confident, decided, errors, told
from nodes_helper import Job, error, model_of, watching

from tessera.methods.cache.profile import Profile
from tessera.methods.cache.schedule import Schedule
from tessera.nodes.cache.confidence_taylor_cache import NAME


def test_all_rows_see_the_prompts_of_a_joined_call():
    model, spec = model_of("flux")
    one, every = (confident(model, threshold=1e-9, gate_on=how) for how in ("first_stream", "all_rows"))
    for patched, job in ((one, Job(spec)), (every, Job(spec))):
        job(patched)
    assert errors(one)[1:] != errors(every)[1:] and told(every)["peak_bytes"] > told(one)["peak_bytes"]
    alone = [errors(p) for p in (one, every) if Job(spec, cfg=1.0)(p) is not None]
    assert alone[0] == alone[1]
    with pytest.raises(ValueError, match="judges one prompt at level output"):
        confident(model, gate_on="all_rows", level="output")


def test_a_batch_is_judged_as_one_and_max_by_its_worst():
    model, spec = model_of("flux")
    noises = [torch.randn(spec.latent, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    measured = {}
    for how in ("first_stream", "max"):
        patched = confident(model, threshold=1e-9, gate_on=how)  # computes all: the trajectories are the plain ones
        for who, noise in (("one", noises[0]), ("two", noises[1]), ("both", torch.cat(noises))):
            Job(spec, noise=noise, batch=len(noise))(patched)
            measured[how, who] = errors(patched)[1:]
    pairs = list(zip(measured["max", "one"], measured["max", "two"], strict=True))
    assert measured["max", "both"] == pytest.approx([max(p) for p in pairs], rel=1e-3)
    assert all(min(p) <= e <= max(p) for p, e in zip(pairs, measured["first_stream", "both"], strict=True))
    same, twice = confident(model), torch.cat([noises[0]] * 2)
    alone = Job(spec, noise=noises[0])(same)
    assert error(Job(spec, noise=twice, batch=2)(same), torch.cat([alone] * 2)) < 1e-4


def test_first_blocks_are_always_computed():
    model, spec = model_of("flux")  # 2 double blocks and 2 single ones
    for count in (1, 2, 3):
        patched = confident(model, first_blocks=count, threshold=2.0)
        with watching(model) as watch:
            assert torch.isfinite(Job(spec, cfg=1.0)(patched)).all()
        full = decided(patched).count("f")
        assert [n // watch.each[-1] for n in watch.each] == [8 // full] * count + [1] * (4 - count) and full < 8
        assert told(patched)["blocks_computed"] == watch.blocks
    with pytest.raises(ValueError, match="always computes the first 4 .* leaves none of this model's 4"):
        confident(model, first_blocks=4)


def test_settings_change_what_is_skipped():
    model, spec = model_of("wan_meta")
    job, found = Job(spec, steps=16), {}
    for how, settings in {
        "plain": {}, "limit": {"max_consecutive": 2}, "follow": {"update_first_every_step": True}, "half": {"threshold": 0.2},
        "rel_l2": {"metric": "rel_l2"}, "cosine": {"metric": "cosine"}, "hermite": {"basis": "hermite"},
        "double": {"threshold": 1.0},
    }.items():  # fmt: skip
        patched = confident(model, **{"threshold": 0.4, **settings})
        assert torch.isfinite(job(patched)).all()
        found[how] = decided(patched)
    assert "ppp" not in found["limit"] and "pp" in found["limit"]
    assert found["half"].count("p") < found["plain"].count("p") < found["double"].count("p")
    assert found["follow"].count("p") >= found["plain"].count("p") and found["cosine"].count("p") > 0


def test_presets_profiles_and_schedules():
    model, spec = model_of("flux")
    job = Job(spec, steps=10)
    by_preset, by_number = confident(model, preset="wan_fast", threshold=0.0), confident(model, threshold=0.36)
    assert torch.equal(job(by_preset), job(by_number)) and decided(by_preset) == decided(by_number)
    profile = Profile(NAME, {"threshold": 0.36, "first_order": 0})
    profiled, plain = (
        confident(model, preset="flux_quality", profile=profile),
        confident(model, threshold=0.36, first_order=0),
    )
    assert torch.equal(job(profiled), job(plain))
    with pytest.raises(ValueError, match="given a profile for Taylor Cache"):
        confident(model, profile=Profile("Taylor Cache", {}))
    mask = (True, True, False, False, True, False, False, True, False, True)
    sigmas = [d["sigma"] for d in told(plain)["decisions"]]
    job(scheduled := confident(model, threshold=0.0, schedule=Schedule(mask, tuple(sigmas))))
    assert decided(scheduled) == "".join("pf"[m] for m in mask)


@pytest.mark.parametrize("inputs, sentence", [
    ({"basis": "newton", "last_order": 3}, "diverge at any interval"), ({"basis": "newton", "first_order": 3, "max_consecutive": 4}, "at interval 5"),
    ({"basis": "hermite", "variable": "sigma"}, "count steps"), ({"start_percent": 0.6, "end_percent": 0.4}, "must not lie after"),
])  # fmt: skip
def test_bad_input(inputs, sentence):
    with pytest.raises(ValueError, match=sentence):
        confident(model_of("flux")[0], **inputs)


def scripted(model, change):
    """The MODEL whose first block returns change(its output, sigma, the number of the call)."""
    calls = []

    def block(args, extra):
        out = extra["original_block"](args)
        calls.append(1)
        sigma = float(args["transformer_options"]["sigmas"][0])
        return {**out, "img": change(out["img"], sigma, len(calls) - 1)}

    patched = model.clone()
    patched.set_model_patch_replace(block, "dit", "double_block", 0)
    return patched, calls


@pytest.mark.parametrize("name", ["flux", "wan_meta"])
@pytest.mark.parametrize("k", [4, 7])
def test_a_jump_of_the_first_block_at_step_k_is_computed(name, k):
    model, spec = model_of(name)
    still = torch.randn(1, 500, 128)
    hooked, calls = scripted(model, lambda img, s, n: still[:, : img.shape[1], : img.shape[2]] * (1 + 5 * (n == k)))
    patched = confident(hooked, threshold=0.3)
    Job(spec, steps=10, cfg=1.0)(patched)
    found = decided(patched)
    assert found[:k] == "ff" + "p" * (k - 2) and found[k] == "f" and len(calls) == 10


@pytest.mark.parametrize("name", ["flux", "wan_meta"])
@pytest.mark.parametrize("variable", ["sigma", "step"])
def test_a_linear_trajectory_skips_every_later_interior_step(name, variable):
    model, spec = model_of(name)
    a, b = torch.randn(2, 1, 500, 128)
    cut = lambda t, img: t[:, : img.shape[1], : img.shape[2]]  # noqa: E731
    place = (lambda s, n: s) if variable == "sigma" else (lambda s, n: float(n))
    hooked, _ = scripted(model, lambda img, s, n: cut(a, img) + cut(b, img) * place(s, n))
    patched = confident(hooked, threshold=1e-4, variable=variable)
    Job(spec, steps=12, cfg=1.0)(patched)
    assert decided(patched) == "ff" + "p" * 9 + "f" and max(errors(patched)[2:]) < 1e-5
