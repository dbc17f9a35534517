"""A run leaves nothing but its picture and its numbers: on success, interrupt and error, whatever ran before."""

import gc
import json
import weakref

import comfy.model_management
import pytest
import torch
from nodes_helper import NODE_ID, Job, facts, model_of, taylor, watching

from tessera.methods.cache.taylor import Forecast
from tessera.patching import report
from tessera.patching.blocks import WrappedForward
from tessera.patching.cache_state import CacheState
from tessera.patching.forward import Forward
from tessera.patching.report import latest_record
from tessera.patching.run import RUN, Feature, Run, attach, current_forward

MODELS = ("flux", "wan_meta", "sd3", "lumina2")
EVERY = pytest.mark.parametrize("name, level", [(n, level) for n in MODELS for level in ("last_block", "output")])


def alive(*kinds_of):
    gc.collect()
    return [o for o in gc.get_objects() if type(o) in kinds_of]


def stop(error, at: int):
    def on_step(step):
        if step == at:
            raise error

    return on_step


def modules(model) -> dict[str, set[str]]:
    """Attributes of every module. Core puts a patched forward back as an attribute, so that one is judged apart."""
    return {name: set(vars(m)) - {"forward"} for name, m in model.model.named_modules()}


def options_tree(value, path=""):
    """Every leaf of the options by identity."""
    if isinstance(value, dict):
        return {k: options_tree(v, f"{path}.{k}") for k, v in value.items()}
    return [options_tree(v) for v in value] if isinstance(value, list) else id(value)


@EVERY
@pytest.mark.parametrize("step", [0, 3, 6])
def test_interrupt_then_rerun(name, level, step):
    model, spec = model_of(name)
    patched = taylor(model, level=level)
    want = Job(spec)(taylor(model, level=level))
    interrupt = comfy.model_management.InterruptProcessingException()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        Job(spec, on_step=stop(interrupt, step))(patched)
    assert latest_record(patched)["ended"] == "interrupted" and len(facts(patched)["decisions"]) == step + 1
    assert current_forward.get() is None
    assert torch.equal(Job(spec)(patched), want) and latest_record(patched)["ended"] == "finished"


@EVERY
@pytest.mark.parametrize("calls", [1, 4])
def test_error_inside_a_block_then_rerun(name, level, calls):
    model, spec = model_of(name)
    patched = taylor(model, level=level)
    plain, want = Job(spec)(model), Job(spec)(patched)
    diffusion_model = model.model.diffusion_model
    block = list(diffusion_model.children())[-2]
    inner = next(m for m in reversed(list(block.modules())) if isinstance(m, torch.nn.Linear))
    left = [calls]

    def fail(*_):
        left[0] -= 1
        if left[0] == 0:
            raise ZeroDivisionError

    handle = inner.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        Job(spec)(patched)
    handle.remove()
    assert latest_record(patched)["ended"] == "error" and current_forward.get() is None
    assert torch.equal(Job(spec)(patched), want)
    assert torch.equal(Job(spec)(model), plain)


@EVERY
@pytest.mark.parametrize("ends", ["finished", "interrupted"])
def test_no_tensor_outlives_the_run(name, level, ends):
    model, spec = model_of(name)
    patched = taylor(model, level=level)
    held = []

    def on_step(step):
        if step == 5:
            forecasts = alive(Forecast)
            held.extend(weakref.ref(t) for f in forecasts for t in f._features)
            held.extend(weakref.ref(f) for f in forecasts)
            if ends == "interrupted":
                raise comfy.model_management.InterruptProcessingException

    try:
        Job(spec, on_step=on_step)(patched)
    except comfy.model_management.InterruptProcessingException as error:
        error.__traceback__ = None
    assert len(held) >= 6  # two streams, each with a history of two tensors
    assert not alive(Forecast, CacheState, Run, Forward)
    assert not [ref for ref in held if ref() is not None]


@EVERY
def test_nothing_is_left_on_modules_or_options(name, level):
    model, spec = model_of(name)
    comfy.model_management.unload_all_models()
    Job(spec, steps=1)(model)
    clean, clean_options = modules(model), options_tree(model.model_options)
    patched = taylor(model, level=level)
    before = options_tree(patched.model_options)
    Job(spec)(patched)
    assert options_tree(patched.model_options) == before and options_tree(model.model_options) == clean_options
    assert RUN not in patched.model_options["transformer_options"]
    Job(spec, steps=1)(model)  # loads the plain MODEL again: object patches go
    assert modules(model) == clean
    assert not alive(Run) and not any(isinstance(m.forward, WrappedForward) for m in model.model.modules())


def test_hooks_of_another_branch_are_inert():
    """Lumina's blocks have no replace hook: their forwards stay wrapped while the MODEL is loaded."""
    model, spec = model_of("lumina2")
    plain = Job(spec)(model)
    patched = taylor(model)
    Job(spec)(patched)
    wrapped = model.model.diffusion_model.layers[0].forward
    assert isinstance(wrapped, WrappedForward)
    output = taylor(model, level="output", interval=1)
    assert torch.equal(Job(spec)(output), plain)


@EVERY
def test_branches_made_while_another_is_loaded(name, level):
    model, spec = model_of(name)
    first, job = taylor(model, level=level), Job(spec)
    one = job(first)
    second = taylor(model, level=level, interval=4)  # made while the first one's patches lie on the modules
    two = job(second)
    comfy.model_management.unload_all_models()
    with watching(model) as watch:
        again = job(second)
    assert torch.equal(again, two) and facts(second)["blocks_computed"] == watch.blocks > 0
    assert facts(second)["blocks_skipped"] > 0 and not torch.equal(one, two)
    assert torch.equal(job(first), one)
    assert torch.equal(job(taylor(model, level=level)), one)


@EVERY
def test_two_samplers_share_one_model(name, level):
    model, spec = model_of(name)
    latent = torch.zeros(*spec.latent[:-2], 4, 4)
    big, small = Job(spec), Job(spec, steps=5, latent=latent, sampler="heun", seed=1)
    shared = taylor(model, level=level)
    a, b = big(shared), small(shared)
    assert torch.equal(big(shared), a) and torch.equal(small(shared), b)
    assert torch.equal(big(taylor(model, level=level)), a) and torch.equal(small(taylor(model, level=level)), b)


@EVERY
def test_second_prompt_with_the_cached_model_decides_alike(name, level):
    model, spec = model_of(name)
    patched = taylor(model, level=level)
    first = Job(spec)(patched)
    decisions, skipped = facts(patched)["decisions"], facts(patched)["blocks_skipped"]
    with watching(model) as watch:
        second = Job(spec, seed=8)(patched)
    assert not torch.equal(first, second)
    assert facts(patched)["decisions"] == decisions and facts(patched)["blocks_skipped"] == skipped > 0
    assert facts(patched)["blocks_computed"] == watch.blocks


def test_records_are_small_and_json():
    model, spec = model_of("flux")
    patched = taylor(model)
    for seed in range(report.KEPT + 3):
        Job(spec, seed=seed, steps=3)(patched)
    ledger = patched.model_options["transformer_options"]["tessera_ledger"]
    assert len(ledger._records) == report.KEPT
    assert len(json.dumps(latest_record(patched), allow_nan=False)) < 4000


def test_the_canvas_hears_of_every_run(monkeypatch):
    heard = []

    class Server:
        client_id = "canvas"

        def send_sync(self, event, data, sid=None):
            heard.append((event, data, sid))

    monkeypatch.setattr(report.PromptServer, "instance", Server(), raising=False)
    model, spec = model_of("flux")
    Job(spec)(taylor(model))
    event, data, sid = heard[-1]
    assert event == report.EVENT and sid == "canvas" and [e for e, *_ in heard].count(event) == 1
    assert data["features"][0]["node"] == NODE_ID and "forecast 4 of 8 evaluations" in data["features"][0]["line"]


def test_a_broken_connection_does_not_cost_the_picture(monkeypatch, caplog):
    class Server:
        client_id = "canvas"

        def send_sync(self, *_):
            raise ConnectionError

    model, spec = model_of("flux")
    patched = taylor(model)
    want = Job(spec)(patched)
    monkeypatch.setattr(report.PromptServer, "instance", Server(), raising=False)
    assert torch.equal(Job(spec)(patched), want) and "could not be written" in caplog.text
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        Job(spec, on_step=stop(comfy.model_management.InterruptProcessingException(), 2))(patched)


def test_two_branches_report_their_own_runs():
    """Both come from one Taylor Cache, and carry features of the same names."""
    model, spec = model_of("flux")
    trunk = taylor(model)
    a, b = (attach(trunk, Feature(None, "Meter")) for _ in range(2))
    Job(spec)(a), Job(spec, steps=5)(b)
    assert latest_record(a)["steps"] == 8 and latest_record(b)["steps"] == 5
    with pytest.raises(ValueError, match="no finished run on this MODEL"):
        latest_record(trunk)
