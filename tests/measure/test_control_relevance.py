"""Relevance on small ControlNets of core's own: what was planted comes first, what adds nothing scores nothing."""

import json

import comfy.model_management
import comfy.samplers
import pytest
import torch
from control_nets_helper import Vae, adapter, flux, flux_model, lora, sd15, unet, xlabs
from nodes_helper import NODE_ID, Job, error, run_node, taylor
from tiny_models import conds

from tessera.nodes.control.select_control_layers import SelectControlLayers
from tessera.nodes.measure.control_relevance import ControlRelevance

IMAGE = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(2))


def measured(target, net, vae=None, **inputs):
    model, spec = target
    positive, negative = conds(spec)
    inputs = {"image": IMAGE, "latent": {"samples": torch.zeros(spec.latent)}, "steps": 4, "seeds": 1, "positive": positive,
              "negative": negative, **inputs}  # fmt: skip
    if vae is not None:
        inputs["vae"] = vae
    return run_node(ControlRelevance, model=model, control_net=net, **inputs)


def scores(relevance):
    return {layer["residuals"]: layer["score"] for layer in relevance["layers"]}


def planted(net, projections, large=None, zero=None):
    """The net with one layer that speaks loudest and one that is silent."""
    found = getattr(net.control_model, projections)
    for i, factor in ((large, 12.0), (zero, 0.0)):
        for parameter in found[i].parameters() if i is not None else ():
            parameter.data *= factor
    return net


@pytest.mark.parametrize("metric", ["latent_l2", "cosine", "edge_f1"])
@pytest.mark.parametrize("best", ["input 0-6", "output 0-18"])
def test_the_planted_layer_is_first_and_the_silent_one_scores_nothing(metric, best):
    names = ("controlnet_blocks", "controlnet_single_blocks")
    loud, silent = names if best.startswith("input") else names[::-1]
    net = planted(planted(flux(), loud, large=0), silent, zero=0)
    relevance, picture, text = measured(flux_model(), net, Vae(), metric=metric)
    found = scores(relevance)
    assert set(found) == {"input 0-6", "input 7-13", "input 14-18", "output 0-18", "output 19-37"}
    assert found[best] > 0 and all(score == 0 for name, score in found.items() if name != best), (
        "FLUX here has two blocks of a kind"
    )
    ranks = {layer["residuals"]: layer["rank"] for layer in relevance["layers"]}
    assert sorted(ranks.values()) == [1, 2, 3, 4, 5] and ranks[best] == 1
    assert json.loads(text) == relevance and picture.shape[0] == 1 and picture.shape[-1] == 3


@pytest.mark.parametrize("large", [0, 1])
def test_order_on_blocks_that_all_count(large):
    """XLabs' kind gives its blocks in turn, so both of the tiny FLUX's first blocks are controlled."""
    net = planted(xlabs(), "controlnet_blocks", large, 1 - large)
    found = scores(measured(flux_model(), net)[0])
    assert (
        found[f"input {large} x{7 - min(large, 1)}"] > 1e-3
        and found[f"input {1 - large} x{7 - min(1 - large, 1)}"] == 0.0
    )


def test_unet_lora_and_adapter():
    target = sd15()
    net = planted(unet(), "zero_convs", 1, 2)
    relevance = measured(target, net)[0]
    found = scores(relevance)
    assert set(found) == {*(f"output {i}" for i in range(6)), "middle 0"}
    assert found["output 2"] == 0.0 and max(found, key=found.get) == "output 1"
    assert relevance["kept"]["blocks"] == 7 and relevance["kept"]["blocks_computed"] == 7
    found = scores(measured(target, lora())[0])
    assert len(found) == 7 and all(score > 0 for score in found.values())
    found = scores(measured(target, adapter())[0])
    assert set(found) == {"input 0", "input 3", "input 6", "input 9"}
    assert min(found["input 6"], found["input 9"]) > 0 == max(found["input 0"], found["input 3"]), (
        "it has two sizes, not four"
    )
    silent = adapter()
    for parameter in silent.t2i_model.body[1].out_conv.parameters():
        parameter.data *= 0
    assert scores(measured(target, silent)[0])["input 6"] == 0.0


def test_a_score_is_the_change_by_hand():
    """The run without the best residual, as Select Control Layers makes it when it keeps all others."""
    model, spec = sd15()
    net = planted(unet(), "zero_convs", 1, 2)
    relevance = measured((model, spec), net, steps=4, cfg=3.0)[0]
    least = json.loads(json.dumps(relevance))
    for layer in least["layers"]:
        layer["rank"] = 8 - layer["rank"]

    def run(control):
        positive, negative = conds(spec)
        hint = control.set_cond_hint(IMAGE.movedim(-1, 1), 1.0, (0.0, 1.0)) if control else None
        sides = [[[c, {**extra, "control": hint} if hint else extra]] for ((c, extra),) in (positive, negative)]
        return Job(spec, steps=4, cfg=3.0, seed=0, positive=sides[0], negative=sides[1])(model)

    full = run(net.copy())
    cut = run(run_node(SelectControlLayers, control_net=net, relevance=least, keep=6)[0])
    best = max(relevance["layers"], key=lambda layer: layer["score"])
    assert best["score"] == pytest.approx(error(cut, full), rel=1e-4)
    assert relevance["without_control"] == pytest.approx(error(run(None), full), rel=1e-4)


def test_the_closing_run_tells_what_keeping_costs_and_saves():
    net = planted(flux(), "controlnet_blocks", 0, 1)
    out = measured(flux_model(), net, Vae(), keep=1)
    kept = out[0]["kept"]
    (report,) = out.ui["tessera_report"]
    assert kept["layers"] == [max(scores(out[0]), key=scores(out[0]).get)]
    assert (kept["blocks_computed"], kept["blocks"]) in ((1, 5), (4, 5)) and kept["change"] > 0
    assert kept["seconds"] > 0 and kept["time_saved"] == pytest.approx(
        1 - kept["seconds"] / kept["seconds_full"], abs=1e-2
    )  # of rounded seconds
    assert report["kind"] == "lines" and report["features"][0]["node"] == NODE_ID
    assert "needs no labels" in report["lines"][1] and len(report["lines"]) == 4 + 5
    whole = measured(flux_model(), net, Vae(), keep=5)[0]["kept"]
    assert whole["change"] == 0.0 and whole["blocks_computed"] == 5


def test_measuring_twice_agrees_and_leaves_everything_as_it_was():
    model, spec = flux_model()
    net, plain = flux(), Job(spec, steps=2)(model)
    first, again = (measured((model, spec), net, Vae(), seeds=2)[0] for _ in range(2))
    assert first["layers"] == again["layers"] and len(first["layers"][0]["scores"]) == 2
    assert first["layers"][0]["scores"][0] != first["layers"][0]["scores"][1]
    assert type(net).__name__ == "ControlNet" and net.cond_hint is None and net.cond_hint_original is None
    assert torch.equal(Job(spec, steps=2)(model), plain)
    assert "tessera_features" not in model.model_options.get("transformer_options", {})


def test_schedule_and_earlier_control_nets_are_taken():
    model, spec = flux_model()
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 6)
    inputs = {"sigmas": sigmas, "sampler": comfy.samplers.sampler_object("heun")}
    relevance = measured((model, spec), flux(), Vae(), **inputs)[0]
    assert relevance["steps"] == 6
    earlier = xlabs().set_cond_hint(IMAGE.movedim(-1, 1), 1.0, (0.0, 1.0))
    positive, negative = conds(spec)
    positive = [[positive[0][0], {**positive[0][1], "control": earlier}]]
    beside = measured((model, spec), flux(), Vae(), positive=positive, **inputs)[0]
    assert beside["sizes"] == relevance["sizes"] and beside["layers"] != relevance["layers"]


def test_progress_counts_every_run_and_a_cancel_goes_through(monkeypatch):
    from tessera.patching import control_relevance

    seen, made = [], []

    class Counted(control_relevance.Progress):
        def __init__(self, total):
            super().__init__(total)
            made.append(self)

        def step(self):
            super().step()
            seen.append(1)

    monkeypatch.setattr(control_relevance, "Progress", Counted)
    measured(flux_model(), xlabs(), seeds=2)
    assert len(seen) == 4 * (2 * (2 + 3) + 2) == made[0].bar.total
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        measured(flux_model(), xlabs())
    assert measured(flux_model(), xlabs())[0]["layers"]


def test_beside_a_cache_the_report_says_so():
    model, spec = flux_model()
    out = measured((taylor(model), spec), xlabs(), steps=8)
    assert out[0]["notes"] == ["Taylor Cache acted on this MODEL; the times are with it"]


def test_what_cannot_be_measured_is_told():
    target = flux_model()
    for inputs, pattern in (
        ({"net": flux()}, "encodes its image, and no VAE is connected"),
        ({"net": xlabs(), "strength": 0.0}, "at strength 0 the ControlNet adds nothing"),
        ({"net": xlabs(), "sigmas": torch.tensor([1.0])}, "at least 2 sigmas, got 1"),
    ):
        with pytest.raises(ValueError, match=pattern):
            measured(target, **inputs)

    class Silent(type(adapter())):
        def get_control(self, *args):
            return None

        def copy(self):
            return Silent(self.t2i_model, 3, 8, "nearest-exact")

    with pytest.raises(ValueError, match="gave no residuals in this run"):
        measured(target, Silent(adapter().t2i_model, 3, 8, "nearest-exact"))
