"""Graphs that users saved keep working: the schemas agree with tests/golden/schemas.json, where they may only grow."""

import copy
import json
from pathlib import Path

import pytest
from schema_lock import broken, slice_of

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests/golden/schemas.json"
INFO = {  # an entry of /object_info, with one input of every sort
    "name": "TesseraExample",
    "category": "Tessera/cache",
    "input": {
        "required": {
            "model": ["MODEL", {"tooltip": "Any model."}],
            "steps": ["INT", {"default": 5, "min": 1, "max": 20, "tooltip": "How many."}],
            "level": ["COMBO", {"options": ["block", "output"], "multiselect": False}],
            "file": ["COMBO", {"options": ["a.safetensors", "b.gguf"]}],
        },
        "optional": {"start": ["FLOAT", {"default": 0.0, "min": 0.0, "max": 1.0}]},
    },
    "output": ["MODEL"],
    "output_name": ["MODEL"],
    "output_node": False,
}


@pytest.fixture
def locked():
    return {"TesseraExample": json.loads(json.dumps(slice_of(INFO)))}


def test_choices_that_are_files_are_not_locked():
    slices = [slice_of(INFO | {"input": {"required": {"weights": ["COMBO", {"options": options}]}}})["inputs"]["weights"]
              for options in (["none", "a.safetensors"], ["none"], ["b.gguf"])]  # fmt: skip
    assert slices[0]["options"] == slices[1]["options"] == ["none"] and "options" not in slices[2]


def changed(edit):
    info = copy.deepcopy(INFO)
    edit(info)
    return {"TesseraExample": slice_of(info)}


def optional(info, **inputs):
    info["input"]["optional"].update(inputs)


BREAKS = {
    "input removed": (lambda i: i["input"]["required"].pop("steps"), "input steps is gone"),
    "input renamed": (
        lambda i: i["input"]["optional"].update(begin=i["input"]["optional"].pop("start")),
        "input start is gone",
    ),
    "type": (lambda i: i["input"]["required"]["steps"].__setitem__(0, "FLOAT"), "type was 'INT', is 'FLOAT'"),
    "default": (lambda i: i["input"]["required"]["steps"][1].update(default=6), "default was 5, is 6"),
    "no default": (lambda i: i["input"]["required"]["steps"][1].pop("default"), "default was 5, is None"),
    "smaller range": (lambda i: i["input"]["required"]["steps"][1].update(max=10), "largest value was 20, is 10"),
    "new smallest": (lambda i: i["input"]["required"]["steps"][1].update(min=2), "smallest value was 1, is 2"),
    "option order": (
        lambda i: i["input"]["required"]["level"][1].update(options=["output", "block"]),
        "new ones come last",
    ),
    "option gone": (lambda i: i["input"]["required"]["level"][1].update(options=["block"]), "choices were"),
    "option in front": (
        lambda i: i["input"]["required"]["level"][1].update(options=["none", "block", "output"]),
        "new ones come last",
    ),
    "new required": (lambda i: i["input"]["required"].update(more=["INT", {"default": 1}]), "must be optional"),
    "became required": (
        lambda i: i["input"]["required"].update(start=i["input"]["optional"].pop("start")),
        "became required",
    ),
    "order": (
        lambda i: i["input"].update(required=dict(sorted(i["input"]["required"].items()))),
        "the order of inputs was",
    ),
    "new before old": (
        lambda i: i["input"].update(optional={"new": ["INT", {"default": 1}], **i["input"]["optional"]}),
        "must come after",
    ),
    "output type": (lambda i: i["output"].__setitem__(0, "LATENT"), "outputs were"),
    "output gone": (lambda i: (i["output"].clear(), i["output_name"].clear()), "outputs were"),
    "category": (lambda i: i.update(category="Tessera/video"), "category was 'Tessera/cache'"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_break_is_told(locked, name):
    edit, sentence = BREAKS[name]
    told = broken(locked, changed(edit))
    assert any(sentence in line and line.startswith("TesseraExample") for line in told), told


GROWS = {
    "nothing": lambda i: None,
    "optional input": lambda i: optional(i, more=["FLOAT", {"default": 0.5}]),
    "last option": lambda i: i["input"]["required"]["level"][1].update(options=["block", "output", "none"]),
    "wider range": lambda i: i["input"]["required"]["steps"][1].update(min=0, max=100),
    "wording": lambda i: i["input"]["required"]["steps"][1].update(tooltip="As many as you like."),
    "files on this machine": lambda i: i["input"]["required"]["file"][1].update(options=["c.safetensors"]),
    "further output": lambda i: (i["output"].append("INT"), i["output_name"].append("steps")),
}


@pytest.mark.parametrize("name", GROWS)
def test_growth_passes(locked, name):
    assert broken(locked, changed(GROWS[name])) == []


def test_a_missing_node_is_told_and_a_new_one_passes(locked):
    assert broken(locked, {}) == ["TesseraExample is gone; register a replacement and lock again."]
    assert broken({}, locked) == []


def test_choices_inside_a_conditional_input_are_locked():
    info = copy.deepcopy(INFO)
    inner = {"required": {"width": ["INT", {"default": 8}]}}
    info["input"]["required"]["mode"] = ["COMFY_DYNAMICCOMBO_V3", {"options": [{"key": "fixed", "inputs": inner}]}]
    before = {"TesseraExample": json.loads(json.dumps(slice_of(info)))}
    assert broken(before, {"TesseraExample": slice_of(info)}) == []
    inner["required"]["width"][1]["default"] = 9
    assert "choices were" in broken(before, {"TesseraExample": slice_of(info)})[0]


def test_the_nodes_keep_what_was_locked(host):
    from tessera.nodes import discover

    locked = json.loads(GOLDEN.read_text())
    current = {}
    for node in discover():
        info = json.loads(json.dumps(node.GET_NODE_INFO_V1()))
        current[info["name"]] = slice_of(info)
    assert broken(locked, current) == []
    assert sorted({*locked} ^ {*current}) == [], "run `make node-assets`"
    assert list(locked) == sorted(locked)
