"""Clones share one network, and what a clone set on it stays there until the next one is loaded: a run begins by what its
own MODEL says."""

import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from nodes_helper import Job, error, model_of, run_node

from tessera.nodes.cache.taylor_cache import TaylorCache
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


def compiled(model):
    """As packs do that compile the network as a whole."""
    made = model.clone()
    made.add_object_patch("diffusion_model", torch.compile(model.get_model_object("diffusion_model"), backend="eager"))
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
