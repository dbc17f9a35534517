"""Nodes of other packs that ours stand in for."""

import pytest
from nodes_helper import model_of

from tessera.nodes import discover
from tessera.patching import replacements as m

NODES = {node.GET_SCHEMA().node_id: node for node in discover(strict=True)}
OLD = {  # what a graph of that pack holds
    "TeaCache": {"model_type": "flux", "rel_l1_thresh": 0.4, "start_percent": 0.1, "end_percent": 0.9,
                 "cache_device": "cuda"},
    "ApplyFBCacheOnModel": {"object_to_patch": "diffusion_model", "residual_diff_threshold": 0.12, "start": 0.0, "end": 1.0,
                            "max_consecutive_cache_hits": -1},
    "MagCache": {"model_type": "flux", "magcache_thresh": 0.06, "retention_ratio": 0.2, "magcache_K": 2, "start_step": 0,
                 "end_step": -1},
    "TaylorSeer": {"model_type": "flux", "fresh_threshold": 5, "max_order": 2, "first_enhance": 3, "last_enhance": 50},
    "TaylorSeerLite": {"model_type": "wanvideo", "fresh_threshold": 6, "max_order": 1, "first_enhance": 3,
                       "last_enhance": 50},
}  # fmt: skip


@pytest.mark.parametrize("switch", m.SWITCHES, ids=lambda s: s.old)
def test_a_switched_node_runs_with_what_it_was_given(switch):
    (made,) = [r for r in m.replacements(NODES.values()) if r.old_node_id == switch.old]
    given = OLD[switch.old]
    assert list(switch.widgets) == list(given) == made.old_widget_ids
    model, _ = model_of("flux")
    inputs = {}
    for entry in made.input_mapping:
        inputs[entry["new_id"]] = (
            {"model": model, **given}[entry["old_id"]] if "old_id" in entry else entry["set_value"]
        )
    node = NODES[made.new_node_id]
    widgets = {w.id: w for w in node.GET_SCHEMA().inputs}
    assert {w.id for w in widgets.values() if not w.optional} <= {*inputs} <= {*widgets}
    for name, value in inputs.items():
        options = getattr(widgets[name], "options", None)
        assert options is None or value in options
        if getattr(widgets[name], "min", None) is not None:
            assert widgets[name].min <= value <= widgets[name].max
    from comfy_api.latest import io

    prepared = node.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: "1"}})
    assert prepared.EXECUTE_NORMALIZED(**inputs)[0] is not model
    for new, old in switch.inputs.items():
        assert inputs[new] == given[old]


def test_a_node_that_did_not_load_replaces_nothing():
    assert m.replacements([]) == []


def test_each_old_node_is_named_once():
    every = [s.old for s in (*m.SWITCHES, *m.LOADERS)]
    assert len({*every}) == len(every) and {s.old for s in m.SWITCHES} == OLD.keys()


@pytest.mark.parametrize("switch", m.LOADERS, ids=lambda s: s.old)
def test_a_loader_keeps_its_file(switch):
    (made,) = [r for r in m.replacements(NODES.values()) if r.old_node_id == switch.old]
    assert made.new_node_id == "TesseraLoadQuantizedModel" and made.old_widget_ids == list(switch.widgets)
    assert made.input_mapping == [{"new_id": "file", "old_id": switch.inputs["file"]}]
    assert switch.inputs["file"] == switch.widgets[0]
