"""A ControlNet that keeps its best residuals: the others are gone, these are bit for bit what they were, and blocks that
nothing needs are not computed. Counted by hooks on the control net's own blocks."""

import contextlib

import comfy.controlnet
import pytest
import torch
from control_nets_helper import NETS, Sampling, Vae, flux, flux_model, lora, residuals, sd15
from nodes_helper import Job, error, run_node
from tiny_models import conds

from tessera.nodes.control.select_control_layers import SelectControlLayers
from tessera.patching.control_layers import NAMES, Layout, Selecting, Selection, blocks_of, layout_of, select, stacks_of
from tessera.patching.control_relevance import VERSION

PARTLY = [name for name in NETS if name != "adapter"]  # an adapter has no blocks that later ones leave unneeded


def layout(net, name) -> Layout:
    seen: list[Layout] = []
    residuals(select(net.copy(), Selection(told=seen.append)), name)
    return seen[0]


def relevance(found: Layout, order):
    """As Control Relevance would give it, with the layers of these numbers ranked in this order."""
    layers = [
        {"list": layer.name, "number": layer.number, "places": list(layer.places), "rank": list(order).index(i) + 1}
        for i, layer in enumerate(found.layers)
    ]
    return {"kind": "control_relevance", "version": VERSION, "sizes": dict(found.sizes), "layers": layers}


def kept(net, found, order, keep):
    out = run_node(SelectControlLayers, control_net=net, relevance=relevance(found, order), keep=keep)
    return out[0], out.ui["tessera_report"][0]["lines"]


@contextlib.contextmanager
def counting(model):
    """Names of the blocks of a control net, in the order in which they are computed meanwhile."""
    seen, handles = [], []
    for stack in stacks_of(model):
        for i, block in enumerate(blocks_of(model, stack)):
            inner = next(
                m for n, m in block.named_modules() if not list(m.children()) and list(m.parameters(recurse=False))
            )
            handles.append(
                inner.register_forward_hook(lambda *_, at=(stack.name, i): seen.append(at) if at not in seen else None)
            )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def same(a, b):
    return (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.parametrize("name", NETS)
def test_all_kept_is_the_net_bit_for_bit(name):
    net = NETS[name]()
    found = layout(net, name)
    made, lines = kept(net, found, range(len(found.layers)), 1000)
    want, got = residuals(net, name), residuals(made, name)
    assert want.keys() == got.keys() and all(len(want[n]) == len(got[n]) for n in want)
    assert all(same(a, b) for n in want for a, b in zip(want[n], got[n], strict=True))
    assert lines[0].startswith(f"{len(found.layers)} of {len(found.layers)} residuals kept")


@pytest.mark.parametrize("name", NETS)
def test_what_is_kept_is_unchanged_and_the_rest_is_gone(name):
    net = NETS[name]()
    found, want = layout(net, name), residuals(net, name)
    count = len(found.layers)
    for order in (range(count), reversed(range(count))):
        order = list(order)
        made, _ = kept(net, found, order, 1)
        got, best = residuals(made, name), found.layers[order[0]]
        for n in want:
            for i, (a, b) in enumerate(zip(want[n], got[n], strict=True)):
                if n == best.name and i in best.places:
                    assert a is not None and torch.equal(a, b)
                else:
                    assert b is None or (name == "hunyuan" and b.numel() == 1 and b.item() == 0)
    assert all(same(a, b) for n in want for a, b in zip(want[n], residuals(net, name)[n], strict=True)), (
        "the source is as it was"
    )


@pytest.mark.parametrize("name", PARTLY)
@pytest.mark.parametrize("best", [0, 1])
def test_blocks_behind_the_last_kept_one_are_not_computed(name, best):
    net = NETS[name]()
    found = layout(net, name)
    with counting(net.control_model) as every:
        residuals(net, name)
    made, lines = kept(net, found, [best, *(i for i in range(len(found.layers)) if i != best)], 1)
    with counting(net.control_model) as seen:
        residuals(made, name)
    assert seen == every[: best + 1] and len(every) > best + 1
    assert f"{best + 1} of {len(every)} control blocks are computed" in lines[0]


def test_middle_and_single_blocks_need_what_is_before_them():
    for name in ("flux", "unet"):
        net = NETS[name]()
        found = layout(net, name)
        made, _ = kept(net, found, [*reversed(range(len(found.layers)))], 1)
        with counting(net.control_model) as seen:
            residuals(made, name)
        assert len(seen) == len(found.layers), "all blocks lead to the last"


def test_repeated_residuals_are_one_layer():
    assert [layer.words for layer in layout(flux(), "flux").layers] == [
        "input 0-6", "input 7-13", "input 14-18", "output 0-18", "output 19-37"
    ]  # fmt: skip
    assert [layer.words for layer in layout(NETS["xlabs"](), "xlabs").layers] == [
        "input 0 x7", "input 1 x6", "input 2 x6"
    ]  # fmt: skip

    a, b = torch.zeros(1), torch.zeros(1)
    told = layout_of({"middle": [a], "output": [None, b, b, a]})
    assert told.sizes == {"output": 4, "middle": 1}
    assert [(x.name, x.number, x.places) for x in told.layers] == [
        ("output", 0, (1, 2)),
        ("output", 1, (3,)),
        ("middle", 0, (0,)),
    ]


def test_earlier_control_nets_stay_whole():
    net = flux()
    found = layout(net, "flux")
    hint = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(5))
    previous = flux().set_cond_hint(hint, 0.7, vae=Vae())
    previous.pre_run(Sampling(), lambda percent: 1 - percent)
    alone = residuals(previous, "flux", strength=0.7)
    made, _ = kept(net, found, range(5), 1)
    both, own = residuals(made, "flux", previous=previous), residuals(net, "flux")
    for i in range(19):
        want = alone["input"][i] + (own["input"][i] if i in found.layers[0].places else 0)
        assert error(both["input"][i], want) < 1e-6
    assert all(error(a, b) < 1e-6 for a, b in zip(both["output"], alone["output"], strict=True))


def test_it_is_a_control_net_of_its_class_in_all_that_core_asks():
    net = flux(strength_type=comfy.controlnet.StrengthType.LINEAR_UP)
    found = layout(net, "flux")
    made, _ = kept(net, found, range(5), 2)
    again = made.copy().copy()
    for one in (made, again):
        assert isinstance(one, comfy.controlnet.ControlNet) and isinstance(one, Selecting)
        assert one.get_models() == net.get_models() and one.inference_memory_requirements(torch.float32) == 0
        assert one.strength_type == net.strength_type and one.latent_format is net.latent_format
    want, got = residuals(net, "flux", 0.5), residuals(again, "flux", 0.5)
    for layer in found.layers[:2]:
        assert all(torch.equal(want[layer.name][i], got[layer.name][i]) for i in layer.places)
    assert got["output"] == [None] * 38
    cloned = made.deepclone_multigpu(torch.device("cpu"))
    assert isinstance(cloned, Selecting) and cloned.control_model is not net.control_model
    assert type(net) is comfy.controlnet.ControlNet and not any(n for n in NAMES if hasattr(net, n))
    made.set_cond_hint(torch.rand(1, 3, 8, 8), 1.0, vae=Vae())
    made.cleanup()
    assert made.cond_hint is None and made.timestep_range is None


def under(control, model, spec, vae=None, strength=1.0):
    """A run of a control net, as core's apply node puts it on."""
    positive, negative = conds(spec)
    hint = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(8))
    net = control.copy().set_cond_hint(hint, strength, (0.0, 1.0), vae=vae)
    sides = (
        [[c, {**extra, "control": net, "control_apply_to_uncond": False}]] for ((c, extra),) in (positive, negative)
    )
    return Job(spec, steps=2, positive=next(sides), negative=next(sides))(model)


def test_whole_runs_on_flux():
    model, spec = flux_model()
    net = flux()
    found = layout(net, "flux")
    plain, want = Job(spec, steps=2)(model), under(net, model, spec, Vae())
    assert error(want, plain) > 1e-3
    assert torch.equal(under(kept(net, found, range(5), 5)[0], model, spec, Vae()), want)
    with counting(net.control_model) as seen:
        got = under(kept(net, found, range(5), 1)[0], model, spec, Vae())
    assert seen == [("input", 0)] and error(got, want) > 1e-4 and error(got, plain) > 1e-4
    assert torch.equal(under(net, model, spec, Vae()), want)


def test_a_control_lora_makes_its_blocks_in_the_run_and_these_are_passed_too():
    model, spec = sd15()
    net, seen = lora(), []
    want = under(select(net.copy(), Selection(told=seen.append)), model, spec)
    assert torch.equal(under(net, model, spec), want)
    found, order = seen[0], range(len(seen[0].layers))
    assert torch.equal(under(kept(net, found, order, 99)[0], model, spec), want)
    made, lines = kept(net, found, order, 1)
    assert "computed" not in lines[0], "its blocks are not known before the run"
    models, pre_run = [], comfy.controlnet.ControlLora.pre_run

    def note(self, *args):
        pre_run(self, *args)
        models.append(self.control_model)

    comfy.controlnet.ControlLora.pre_run = note
    calls = []
    try:
        whole = torch.nn.Module.__call__
        torch.nn.Module.__call__ = lambda self, *a, **k: (calls.append(self), whole(self, *a, **k))[1]
        got = under(made, model, spec)
    finally:
        torch.nn.Module.__call__ = whole
        comfy.controlnet.ControlLora.pre_run = pre_run
    blocks = [b for stack in stacks_of(models[-1]) for b in blocks_of(models[-1], stack)]
    assert [block in calls for block in blocks] == [True] + [False] * (len(blocks) - 1)
    assert error(got, want) > 1e-4


def test_what_was_measured_on_another_net_is_refused():
    found = layout(flux(), "flux")
    made, _ = kept(NETS["xlabs"](), found, range(5), 2)
    with pytest.raises(
        ValueError, match="gives 19 input and 38 output residuals, and this one gives 19 input residuals"
    ):
        residuals(made, "xlabs")


@pytest.mark.parametrize(
    ("measured", "used", "name", "keep"),
    [
        (lambda: flux(3, 2), lambda: flux(5, 2), "flux", 1),
        (lambda: flux(5, 2), lambda: flux(3, 2), "flux", 1),
        (lambda: flux(3, 0), NETS["xlabs"], "xlabs", 1),
        (NETS["xlabs"], lambda: flux(3, 0), "flux", 2),
    ],
    ids=["more blocks", "fewer blocks", "in turn", "not in turn"],
)
def test_another_net_with_as_many_residuals_is_refused(measured, used, name, keep):
    """They come from other blocks there: one that is not computed would give the MODEL what no projection made."""
    found, used = layout(measured(), "xlabs" if keep == 2 else "flux"), used()
    assert found.sizes == layout(used, name).sizes
    made, _ = kept(used, found, range(len(found.layers)), keep)
    with pytest.raises(ValueError, match="from other blocks. Measure this ControlNet with Control Relevance"):
        residuals(made, name)


def test_a_net_that_selects_already_is_what_it_still_gives():
    net = flux()
    found = layout(net, "flux")
    first, _ = kept(net, found, (0, 3, 1, 2, 4), 2)
    again, lines = kept(first, found, (4, 3, 0, 1, 2), 1)
    assert lines == ["1 of 5 residuals kept, 4 of 5 control blocks are computed", f"kept: {found.layers[3].words}"]
    want = residuals(net, "flux")
    for made, numbers in ((first, (0, 3)), (again, (3,)), (kept(first, found, range(5), 5)[0], (0, 3))):
        places = {(found.layers[n].name, place) for n in numbers for place in found.layers[n].places}
        for name, entries in residuals(made, "flux").items():
            for i, entry in enumerate(entries):
                assert same(entry, want[name][i] if (name, i) in places else None)
    left = layout(first, "flux")
    assert left.layers == (found.layers[0], found.layers[3]), "Control Relevance measures these alone"
    with pytest.raises(ValueError, match="of which some are left out already"):
        kept(first, layout(NETS["xlabs"](), "xlabs"), range(3), 1)


def test_what_is_no_relevance_or_no_control_net_of_core_is_refused():
    found = layout(flux(), "flux")
    for bad in (
        None,
        {},
        [],
        {"kind": "lines"},
        {**relevance(found, range(5)), "version": 99},
        {**relevance(found, range(5)), "layers": [{}]},
    ):
        with pytest.raises(ValueError, match="got no relevance"):
            run_node(SelectControlLayers, control_net=flux(), relevance=bad, keep=2)

    class Own(comfy.controlnet.ControlNet):
        def control_merge(self, *args, **kwargs):
            return super().control_merge(*args, **kwargs)

        def copy(self):
            return Own(self.control_model, load_device=self.load_device)

    with pytest.raises(ValueError, match="Own merges its residuals in its own way"):
        kept(Own(flux().control_model, load_device=torch.device("cpu")), found, range(5), 2)
