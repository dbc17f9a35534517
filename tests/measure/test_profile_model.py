"""Profile Model: its time against a clock from outside, a run that no hook changes, and what patches on the MODEL show."""

import gc
import json
import time

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from nodes_helper import Job, model_of, run_node, taylor
from profile_helper import job_of, profiled
from quantized_helper import LAYER, lora, quantized, with_lora
from quantized_helper import folder as folder  # a fixture
from tiny_models import empty_latent

import folder_paths  # isort: skip

from tessera import archs
from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.nodes.measure.accelerate import Accelerate
from tessera.patching import profile as m
from tessera.patching.profile_shapes import ShapeMeter


@pytest.mark.parametrize("name", ["flux", "wan_meta", "sd3", "ernie"])
def test_time_adds_up_and_nothing_is_changed(name, monkeypatch):
    model, spec = model_of(name)
    want, before, errors = Job(spec, steps=4)(model), hooks_of(model), []
    kept, step = m.until, m.Progress.step
    for _ in range(3):  # a machine that stops between two clocks is no fault of either
        ends, clock = [], []

        def until(*args, ends=ends):
            ends.append(kept(*args))
            return ends[-1]

        def stamped(self, clock=clock):
            clock.append(time.perf_counter())
            step(self)

        with monkeypatch.context() as patch:
            patch.setattr(m, "until", until)
            patch.setattr(m.Progress, "step", stamped)
            found = m.measure(model, job_of(model, spec), m.Asked("events", 0))
        assert all(torch.equal(outcome.samples, want) for outcome in ends[-2:])  # without hooks, and with them
        assert hooks_of(model) == before and not found.run.handles
        inside = sum(c.seconds for (s, _, _), c in found.run.cells.items() if s > 0)
        outside = clock[-1] - clock[-4]  # the last three of the four steps, by a clock that knows no meter
        errors.append(abs(inside / outside - 1))
        told = sum(cell.seconds for cell in found.run.cells.values())
        assert told == pytest.approx(sum(found.run.seconds), rel=0.02)
        if errors[-1] <= 0.02:
            break
    assert min(errors) <= 0.02, errors
    assert torch.equal(Job(spec, steps=4)(model), want)


def hooks_of(model):
    network = model.model.diffusion_model
    return [(len(x._forward_hooks), len(x._forward_pre_hooks)) for x in network.modules()], [*model.object_patches]


def test_a_report_with_time():
    model, spec = model_of("wan_meta")
    report = profiled(model, spec, cfg=3.0)
    rows = report["classes"]
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1, abs=0.02)
    assert sum(row["seconds"] for row in rows.values()) == pytest.approx(report["step_seconds"], rel=0.02)
    assert all(rows[k]["share"] > 0 for k in ("attention", "linear", "norm", "other", "outside", "profiler"))
    assert rows["profiler"]["share"] < 0.2 and report["plain_step_seconds"] > 0
    assert (report["conditions"], report["rows"], report["network_calls"]) == ("joined", [2], 1)
    assert [s["kind"] for s in report["steps"]] == ["full"] * 4 and report["computed_share"] == pytest.approx(
        1, abs=1e-3
    )
    assert report["attention"][0] == {"queries": 120, "keys": 120, "calls": 3, "share": pytest.approx(0.9, abs=0.1)}
    assert report["memory"]["weights"] == model.model_size() and report["memory"]["peak"] > 0
    assert profiled(model, spec, cfg=1.0, mode="analytic")["conditions"] == "one prompt"


def test_separate_guidance_is_told(monkeypatch):
    model, spec = model_of("flux")
    joined = profiled(model, spec, mode="analytic")
    monkeypatch.setattr(type(model), "get_free_memory", lambda self, device: 1 << 10)
    apart = profiled(model, spec)
    assert (apart["conditions"], apart["rows"], apart["network_calls"]) == ("separate", [1, 1], 2)
    assert apart["step_flops"] == pytest.approx(joined["step_flops"], rel=1e-6)
    assert [s["kind"] for s in apart["steps"]] == ["full"] * 4


@pytest.mark.parametrize("mode", ["events", "analytic"])
def test_samplers_that_ask_several_times_a_step(mode, monkeypatch):
    model, spec = model_of("flux")
    one = profiled(model, spec, mode="analytic")
    heun = comfy.samplers.sampler_object("heun")
    two = profiled(model, spec, mode=mode, sampler=heun)
    assert two["step_flops"] == pytest.approx(one["step_flops"] * 7 / 4, rel=1e-6)  # the last step asks once
    assert two["attention"][0]["calls"] == one["attention"][0]["calls"] * 7 / 4
    assert two["computed_share"] == (pytest.approx(1, abs=1e-3) if mode == "events" else None)
    assert any("asks the model 1.75 times" in note for note in two["notes"])
    assert sum(row["flops"] for row in two["by_block"]) == pytest.approx(
        sum(r["flops"] for r in one["by_block"]) * 7 / 4
    )


def test_what_accelerate_chose_is_measured_and_not_its_trials(monkeypatch, tmp_path):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    model, spec = model_of("flux")
    chooses = run_node(Accelerate, model=model, again=True, trials=4, min_ssim=0.0)[0]
    report = profiled(chooses, spec, steps=8)
    assert report["network_calls"] == 1 and [s["calls"] for s in report["steps"]] == [1] * 8
    assert report["computed_share"] <= 1.001


@pytest.mark.parametrize("level", ["last_block", "output"])
@pytest.mark.parametrize("name", ["flux", "lumina2"])
def test_replayed_steps_show_what_a_cache_saves(name, level):
    model, spec = model_of(name)
    report = profiled(taylor(model, level=level), spec, steps=8)
    assert [s["kind"] for s in report["steps"]] == [{"f": "full", "p": "forecast"}[k] for k in "ffppfppf"]
    assert 0.4 < report["computed_share"] < 0.75  # refiners and what lies around the stack run at every call
    assert any("saved the rest" in note for note in report["notes"]) and report["features"] == ["Taylor Cache"]
    assert not any("Cache" in row["node"] for row in report["advice"])


@pytest.mark.parametrize("format", ["int8_row", "fp8_e4m3"])
@pytest.mark.usefixtures("folder")
def test_packed_layers_and_lora_count_as_the_layers_that_they_are(format):
    plain, packed, spec, _ = quantized("flux", format)
    want = profiled(plain, spec, mode="analytic")
    for model in (packed, with_lora(packed, lora(packed, LAYER["flux"]))):
        got = profiled(model, spec)
        assert got["counted"] == "shapes" and got["step_flops"] == want["step_flops"]
        assert got["computed_share"] == pytest.approx(1, abs=1e-3)
        assert got["classes"]["linear"]["bytes"] < want["classes"]["linear"]["bytes"]
        assert not any(row["node"] == "Quantize Model" for row in got["advice"])


def test_sparse_attention_is_seen_through_our_dispatcher_and_theirs_is_not_lost():
    model, spec = model_of("wan_meta")
    cut = run_node(LocalWindowAttention, model=model, radius=1, min_tokens=0)[0]
    want = Job(spec, steps=4)(cut)
    found = m.measure(cut, job_of(cut, spec), m.Asked("events", 0))
    assert torch.equal(found.outcome.samples, want)
    assert found.run.lengths[120, 120] == 3 * 4 and found.run.lengths[120, 12] == 3 * 4
    notes = profiled(cut, spec)["notes"]
    assert any(n.startswith("Local Window Attention computed") and "FLOPs here count them all" in n for n in notes)


class Halt(Exception):
    pass


@pytest.mark.parametrize("error", [Halt, comfy.model_management.InterruptProcessingException])
@pytest.mark.parametrize("mode", ["events", "analytic", "trace"])
def test_hooks_are_gone_after_an_interrupt_or_an_error(mode, error, monkeypatch, tmp_path):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    model, spec = model_of("flux")
    before, want, steps = hooks_of(model), Job(spec, steps=4)(model), []
    step = m.Progress.step

    def stops(self):
        steps.append(1)
        step(self)
        if len(steps) == {"events": 8, "analytic": 1, "trace": 4}[mode]:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(m.Progress, "step", stops)
        with pytest.raises(error):
            profiled(model, spec, mode=mode)
    gc.collect()
    assert hooks_of(model) == before and not any(model.wrappers.values())
    assert torch.equal(Job(spec, steps=4)(model), want)


def test_an_interrupt_while_shapes_are_counted_is_not_taken_for_a_network_that_needs_values(monkeypatch):
    model, spec = model_of("flux")

    def pressed(*args):
        raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(ShapeMeter, "answer", pressed)
    before = hooks_of(model)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        profiled(model, spec, mode="analytic")
    assert hooks_of(model) == before


def test_a_compiled_model_is_refused_in_one_mode_and_counted_in_another():
    model, spec = model_of("flux")
    model = model.clone()
    set_torch_compile_wrapper(model, backend="eager")
    assert WrappersMP.APPLY_MODEL in model.wrappers
    with pytest.raises(ValueError, match="torch.compile has made one piece of.*mode to trace or analytic"):
        profiled(model, spec)
    part = model_of("flux")[0]
    part.add_object_patch(
        "diffusion_model.img_in", torch.compile(part.get_model_object("diffusion_model.img_in"), backend="eager")
    )
    with pytest.raises(ValueError, match="torch.compile has made one piece of"):
        profiled(part, spec)
    assert profiled(model, spec, mode="analytic")["step_flops"] > 0


def test_a_trace_is_saved_and_its_time_is_told_by_class(monkeypatch, tmp_path):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    model, spec = model_of("flux")
    report = profiled(model, spec, steps=2, mode="trace", name="mine")
    where = tmp_path / "tessera_model_profiles"
    events = json.loads((where / "mine.trace.json").read_text())["traceEvents"]
    assert any("addmm" in e.get("name", "") for e in events)
    assert report["classes"]["linear"]["share"] > 0.05 and report["step_seconds"] > 0
    saved = json.loads((where / "mine.json").read_text())
    assert saved["step_flops"] == report["step_flops"] and saved["kind"] == "profile"
    with pytest.raises(ValueError, match="profile name"):
        profiled(model, spec, mode="analytic", name="../up")


def test_what_lies_outside_of_sampling_is_timed_once_a_picture():
    model, spec = model_of("flux")
    seen = []
    asked = m.Asked("events", 2, lambda: time.sleep(0.03), lambda samples: seen.append(samples.shape))
    found = m.measure(model, job_of(model, spec), asked)
    assert 0.03 <= found.outside["text"] < 1 and found.outside["vae"] >= 0
    assert seen == [empty_latent(spec).shape] * 2 and len(found.run.seconds) == len(found.plain) == 2


def test_an_unknown_architecture_is_told_without_blocks(monkeypatch):
    model, spec = model_of("flux")
    want = profiled(model, spec, mode="analytic")
    monkeypatch.setattr(archs, "find", lambda network: None)
    report = profiled(model, spec)
    assert not report["known"] and report["by_block"] == [] and any("not known" in note for note in report["notes"])
    assert report["step_flops"] == want["step_flops"] and report["classes"]["attention"]["share"] > 0
    assert [s["kind"] for s in report["steps"]] == ["full"] * 4


def test_advice_names_what_serves_this_model():
    model, spec = model_of("flux2")
    advised = {row["node"] for row in profiled(model, spec, steps=20, mode="analytic")["advice"]}
    assert "Taylor Cache" in advised
    few = {row["node"] for row in profiled(model, spec, steps=4, mode="analytic")["advice"]}
    assert not few & {"Taylor Cache", "Step Cache"}
