"""Clones share one network, and what a clone set on it stays there until the next one is loaded: a run begins by what its
own MODEL says."""

import comfy.model_management
import pytest
import torch
from calibration_helper import calibrate
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from nodes_helper import Job, error, model_of, run_node
from profile_helper import profiled

from tessera import archs
from tessera.nodes.cache.taylor_cache import TaylorCache
from tessera.patching.forwards import StandIn
from tessera.patching.plan import plan
from tessera.patching.report import latest_record
from tessera.patching.run import Feature, attach
from tessera.patching.sizes import fingerprint


class Asks(Feature):
    """Keeps what a run says of its MODEL when it begins."""

    def begin(self, run):
        self.node.append((run.percent_to_sigma(0.5), run.dtype))


def told(model, spec):
    kept: list = []
    Job(spec, steps=1)(attach(model, Asks(kept, "Asks")))
    return kept[0]


@pytest.mark.parametrize("first", ["own", "plain"])
def test_a_shift_and_a_precision_count_from_the_first_run_on(first):
    model, spec = model_of("sd3")
    plain = told(model, spec)
    (own,) = ModelSamplingSD3().patch(model, 8.0)
    own.set_model_compute_dtype(torch.bfloat16)
    want = float(own.get_model_object("model_sampling").percent_to_sigma(0.5)), torch.bfloat16
    assert plain == (float(model.get_model_object("model_sampling").percent_to_sigma(0.5)), torch.float32)
    assert want[0] != plain[0]
    for turn in (own, own, model, own) if first == "own" else (model, own, model, model):
        assert told(turn, spec) == (want if turn is own else plain)


def compiled(model, *paths):
    """As packs do that compile the network as a whole, or some of its blocks."""
    made = model.clone()
    for path in paths or ("diffusion_model",):
        made.add_object_patch(path, torch.compile(model.get_model_object(path), backend="eager"))
    return made


@pytest.mark.parametrize("order", ["compiled first", "cached first"])
def test_a_network_compiled_as_a_whole_is_known_in_every_run(order):
    model, spec = model_of("flux")
    cache = {"interval": 2, "warmup": 2}
    want = Job(spec, steps=6)(run_node(TaylorCache, model=model, **cache)[0])
    if order == "compiled first":
        patched = run_node(TaylorCache, model=compiled(model), **cache)[0]
    else:
        patched = compiled(run_node(TaylorCache, model=model, **cache)[0])
    about = fingerprint(model.model.diffusion_model)
    for _ in range(2):
        got = Job(spec, steps=6)(patched)
        record = latest_record(patched)
        assert record["architecture"] == "Flux" and record["features"][0]["facts"]["forecast"] > 0
        assert error(got, want) < 1e-6
        assert fingerprint(model.model.diffusion_model) == about  # it is on the shared network now
    again = run_node(TaylorCache, model=model, **cache)[0]  # a node that is run anew meanwhile
    assert torch.equal(Job(spec, steps=6)(again), want)


def blocks_of(model):
    network = model.model.diffusion_model
    stack = [spec for spec in archs.find(network).blocks if spec.stack]
    return [f"diffusion_model.{path}" for spec in stack for path, _ in archs.block_modules(network, spec)]


def left(model):
    """Stand-ins of ours on the network that all clones share."""
    held = [vars(module).get("forward") for module in model.model.diffusion_model.modules()]
    return [forward for forward in held if isinstance(forward, StandIn)]


@pytest.mark.parametrize(("name", "level"), [("flux", "module"), ("pixart", "last_block")])
@pytest.mark.parametrize("order", ["compiled first", "cached first"])
def test_compiled_blocks_leave_nothing_of_ours_on_the_network(name, level, order):
    model, spec = model_of(name)
    cached = lambda model: run_node(TaylorCache, model=model, level=level, interval=2, warmup=2)[0]  # noqa: E731
    job, whole = Job(spec, steps=5), Job(spec, steps=2)
    plain, want = whole(model), job(cached(model))
    places = blocks_of(model)
    both = cached(compiled(model, *places)) if order == "compiled first" else compiled(cached(model), *places)
    for _ in range(2):
        assert torch.equal(job(both), want)
        assert latest_record(both)["features"][0]["facts"]["forecast"]
        again = cached(model)  # a node that is run anew while they are compiled
        assert torch.equal(whole(model), plain) and not left(model)
        assert torch.equal(job(again), want)
    comfy.model_management.unload_all_models()
    assert not left(model) and torch.equal(whole(model), plain)


def test_a_profile_of_a_compiled_network_leaves_it_as_it_was():
    model, spec = model_of("flux")
    plain, want = Job(spec, steps=2)(model), profiled(model, spec, steps=1, mode="analytic")
    made = profiled(compiled(model), spec, steps=1, mode="analytic")
    assert made["counted"] == "shapes" and made["classes"] == want["classes"]
    assert torch.equal(Job(spec, steps=2)(model), plain)


class Foreign(torch.nn.Module):
    """Another pack's network, of which nothing is known."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.dtype = [inner], inner.dtype

    def forward(self, *args, **kwargs):
        return self.inner[0](*args, **kwargs)


def test_a_network_of_another_pack_on_another_clone_is_not_taken_for_ours():
    model, spec = model_of("flux")
    cached = lambda: run_node(TaylorCache, model=model, interval=2, warmup=2)[0]  # noqa: E731
    want, lines = Job(spec, steps=5)(cached()), plan(cached())["lines"]
    theirs = model.clone()
    theirs.add_object_patch("diffusion_model", Foreign(model.get_model_object("diffusion_model")))
    comfy.model_management.load_models_gpu([theirs])
    about = fingerprint(model)
    made = cached()
    assert plan(made)["lines"] == lines and torch.equal(Job(spec, steps=5)(made), want)
    assert fingerprint(model) == about


def test_a_fingerprint_is_that_of_the_file_under_a_lora_with_biases():
    model, _ = model_of("sd3")
    about, held = fingerprint(model), model.model.state_dict()
    lora = model.clone()
    lora.add_patches({name: ("diff", (torch.ones_like(held[name], dtype=torch.float32),)) for name in held})
    comfy.model_management.load_models_gpu([lora])
    assert fingerprint(model.model.diffusion_model) != about
    assert fingerprint(lora) == fingerprint(model) == about
    comfy.model_management.load_models_gpu([model])
    assert fingerprint(lora) == fingerprint(model) == about


def test_a_calibration_of_a_compiled_network_is_that_of_the_plain_one():
    model, spec = model_of("sd3")
    want = calibrate(model, spec)
    for _ in range(2):
        got = calibrate(compiled(model), spec)
        assert torch.equal(got[2]["samples"], want[2]["samples"]) and got[1] == want[1]
