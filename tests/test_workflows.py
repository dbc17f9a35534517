"""Every template: the canvas file and its API twin say the same, it has a thumbnail, and only what it needs to say; and
the converter that makes the canvas files."""

import json
from itertools import combinations
from pathlib import Path

import pytest
from canvas import NOTE, bare, complete, dump, entries, growth, models, needs, to_api, to_canvas, told, widget_values
from graph_picture import draw
from PIL import Image
from thumbnail import save_thumbnail

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "workflows").glob("*.json"))
TWINS = sorted((ROOT / "workflows/api").glob("*.json"))


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_template_has_its_twin_and_its_thumbnail():
    assert FILES
    assert [p.name for p in FILES] == [p.name for p in TWINS]
    assert [p.stem for p in FILES] == [p.stem for p in sorted((ROOT / "workflows").glob("*.jpg"))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_canvas_and_twin_name_the_same_nodes_links_and_values(path):
    twin = load(path.parent / "api" / path.name)
    assert to_api(load(path)) == bare(twin) and told(load(path)) == needs(twin)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_canvas_file_is_sound(path):
    canvas = load(path)
    nodes = {node["id"]: node for node in canvas["nodes"]}
    assert len(nodes) == len(canvas["nodes"]) and max(nodes) <= canvas["last_node_id"]
    for number, source, output, target, slot, kind in canvas["links"]:
        assert number in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == number
        assert kind == nodes[source]["outputs"][output]["type"]


# What a run draws, measured in Chromium with both renderers: the width of a panel, and the height that a node gains
# from reports with every part that they can have.
PANEL = 380
DRAWN = {"TesseraCompare": 662, "TesseraRunReport": 471, "TesseraAttentionProbe": 418, "TesseraTaylorCache": 49,
         "TesseraLocalWindowAttention": 49, "SaveImage": 206, "SaveAnimatedWEBP": 222}  # fmt: skip
TITLE = 30


@pytest.mark.parametrize("drawn", [{}, DRAWN], ids=["before a run", "after it"])
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_no_node_covers_another(path, drawn):
    boxes = []
    for node in load(path)["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        gain = drawn.get(node["type"], 0)
        boxes.append((node["type"], x, y - TITLE, x + (max(width, PANEL) if gain else width), y + height + gain))
    for a, b in combinations(boxes, 2):
        apart = a[1] >= b[3] or b[1] >= a[3] or a[2] >= b[4] or b[2] >= a[4]
        assert apart, f"{a[0]} and {b[0]} overlap"


def test_the_layout_leaves_room_for_what_a_run_draws():
    assert all(growth(kind) >= gain for kind, gain in DRAWN.items())


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_two_samplers_of_one_template_agree(path):
    """KSampler and Compare work at the same guidance, and so the pictures of both are of the same quality. An inversion draws
    none, and distilled models have no guidance."""
    graph = load(path.parent / "api" / path.name)
    drawing = [node["inputs"] for node in graph.values() if node["class_type"] != "TesseraRfInvert"]
    scales = {inputs["cfg"] for inputs in drawing if "cfg" in inputs}
    distilled = any(node["class_type"] == "TesseraFewStepSampler" for node in graph.values())
    assert len(scales) == 1 and (needs(graph) or scales <= {2.0, 3.0, *([1.0] if distilled else [])})


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_template_shows_the_pack_and_runs_anywhere(path):
    graph = load(path.parent / "api" / path.name)
    assert any(node["class_type"].startswith("Tessera") for node in graph.values())
    values = [value for node in graph.values() for value in node["inputs"].values() if isinstance(value, str)]
    files = models(value for value in values if value.endswith((".safetensors", ".gguf", "/transformer")))
    carried = {
        p.name
        for folder in ("models", "presets/calibrations", "presets/olss", "presets/video_states")
        for p in (ROOT / folder).glob("*.safetensors")
    }
    offered = models(weight["name"] for weight in needs(graph))
    assert files <= carried | offered, "the pack neither carries this model nor says where it is"
    assert not offered or files == offered
    for weight in needs(graph):
        assert weight["url"].startswith("https://huggingface.co/")
        assert weight["url"].rpartition("/")[2] == weight["name"].rpartition("/")[2]
    with Image.open(path.with_suffix(".jpg")) as thumbnail:
        assert thumbnail.format == "JPEG" and 256 <= max(thumbnail.size) <= 1024
        assert max(high for _, high in thumbnail.convert("RGB").getextrema()) > 64, "the thumbnail is black"
    assert path.with_suffix(".jpg").stat().st_size < 200_000


INFO = {
    "Source": {
        "display_name": "Source",
        "input": {
            "required": {
                "seed": ["INT", {"default": 3, "control_after_generate": True}],
                "kind": [["a", "b"], {}],
                "mode": ["COMFY_DYNAMICCOMBO_V3", {"options": [
                    {"key": "off", "inputs": {}},
                    {"key": "on", "inputs": {"required": {"width": ["INT", {"default": 8}]}}},
                ]}],
            },
            "optional": {"scale": ["FLOAT", {"default": 0.5}], "mask": ["MASK", {}]},
        },
        "output": ["IMAGE", "MASK"], "output_name": ["image", "mask"],
    },
    "Join": {
        "display_name": "Join",
        "input": {"required": {
            "images": ["COMFY_AUTOGROW_V3", {"template": {"input": {"required": {"image": ["IMAGE", {}]}}}}],
            "width": ["INT", {"default": 16}],
        }},
        "output": [], "output_name": [],
    },
}  # fmt: skip
GRAPH = {
    "1": {"class_type": "Source", "inputs": {"mode": "on"}, "_meta": {"title": "First", "note": "Says why."}},
    "2": {"class_type": "Source", "inputs": {"seed": 9, "mask": ["1", 1]}},
    "7": {"class_type": "Join", "inputs": {"images.image0": ["1", 0], "images.image1": ["2", 0], "width": ["2", 0]}},
}


@pytest.fixture
def graph():
    return complete(json.loads(json.dumps(GRAPH)), INFO)


def test_complete_names_every_widget_in_schema_order(graph):
    assert graph["1"]["inputs"] == {"seed": 3, "kind": "a", "mode": "on", "mode.width": 8, "scale": 0.5}
    assert list(graph["1"]["inputs"]) == ["seed", "kind", "mode", "mode.width", "scale"]
    assert graph["2"]["inputs"] == {"seed": 9, "kind": "a", "mode": "off", "scale": 0.5, "mask": ["1", 1]}
    assert complete(graph, INFO) == graph


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        ({"class_type": "Nope", "inputs": {}}, "Nope, which this ComfyUI does not have"),
        ({"class_type": "Source", "inputs": {"wide": 1}}, r"Source \(node 1\) has no input wide"),
        ({"class_type": "Source", "inputs": {"mode": "off", "mode.width": 1}}, "has no input mode.width"),
    ],
)
def test_complete_refuses_what_the_schema_does_not_have(node, sentence):
    with pytest.raises(ValueError, match=sentence):
        complete({"1": node}, INFO)


def test_canvas_says_what_the_graph_says(graph):
    canvas = json.loads(dump(to_canvas("example", graph, INFO, "1.2.3")))
    assert to_api(canvas) == bare(graph)
    by_id = {node["id"]: node for node in canvas["nodes"]}
    assert by_id[1]["widgets_values"] == [3, "fixed", "a", "on", 8, 0.5]
    assert by_id[1]["title"] == "First" and "title" not in by_id[2]
    assert [n["widgets_values"] for n in canvas["nodes"] if n["type"] == NOTE] == [["Says why."]]
    assert [by_id[i]["pos"][0] for i in (1, 2, 7)] == sorted({by_id[i]["pos"][0] for i in (1, 2, 7)})


def test_needed_weights_are_offered_by_the_canvas(graph):
    weight = {"name": "big.safetensors", "url": "https://example.org/big.safetensors", "directory": "loras"}
    graph["2"]["_meta"] = {"needs": [weight]}
    canvas = to_canvas("example", graph, INFO, "1.2.3")
    assert needs(graph) == told(canvas) == [weight] and to_api(canvas) == bare(graph)
    offering = [node["id"] for node in canvas["nodes"] if "models" in node["properties"]]
    assert offering == [2], "where the frontend looks for them"


def test_a_drawing_shows_every_node_apart(graph):
    """Our boxes' colour is there only for our nodes; more columns than a row holds go below."""
    plain = draw(to_canvas("example", graph, INFO, "1.2.3"), INFO)
    colours = {colour for _, colour in plain.getcolors(1 << 20)}
    assert (0x4A, 0x4A, 0x4A) in colours and (0x1F, 0x6F, 0x6B) not in colours
    info = {
        **INFO,
        "TesseraPass": {**INFO["Join"], "display_name": "Pass", "output": ["IMAGE"], "output_name": ["image"]},
    }
    chain = {"1": graph["1"]}
    for i in range(2, 8):
        inputs = {"images.image0": [str(i - 1), 0], "width": 16}
        chain[str(i)] = {
            "class_type": "TesseraPass",
            "inputs": inputs,
            "_meta": {"title": "A title too long for a box of one column"},
        }
    drawn = draw(to_canvas("chain", complete(chain, info), info, "1.2.3"), info)
    assert (0x1F, 0x6F, 0x6B) in {colour for _, colour in drawn.getcolors(1 << 20)}
    assert max(drawn.size) <= 1024 and drawn.height > plain.height * drawn.width / plain.width / 2


def test_a_changed_value_or_link_is_seen(graph):
    canvas = to_canvas("example", graph, INFO, "1.2.3")
    source = next(n for n in canvas["nodes"] if n["id"] == 2)
    source["widgets_values"][0] = 10
    assert to_api(canvas) != bare(graph)
    source["widgets_values"][0] = 9
    assert to_api(canvas) == bare(graph)
    canvas["links"][0][1] = 7
    assert to_api(canvas) != bare(graph)


@pytest.mark.parametrize(
    ("change", "sentence"), [(lambda v: v.pop(), "no value"), (lambda v: v.append(1), "without a")]
)
def test_values_that_do_not_fit_the_widgets_are_refused(graph, change, sentence):
    node = to_canvas("example", graph, INFO, "1.2.3")["nodes"][0]
    change(node["widgets_values"])
    with pytest.raises(ValueError, match=sentence):
        widget_values(node)


def test_older_choices_and_forced_sockets():
    found = entries({"required": {"kind": [["x", "y"]], "text": ["STRING", {"forceInput": True}]}}, {})
    assert [(e.type, e.is_widget, e.default) for e in found] == [("COMBO", True, "x"), ("STRING", False, "")]


def test_thumbnail_tiles_and_enlarges(tmp_path):
    frames = [Image.new("RGB", (32, 32), (40 * i, 0, 0)) for i in range(5)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    save_thumbnail([tmp_path / "a.webp"], tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as made:
        assert made.size == (480, 320)  # 3 x 2 cells of 32 pixels, five times
        assert abs(made.getpixel((240, 240))[0] - 160) < 8


def test_a_graph_without_pictures_has_no_thumbnail(tmp_path):
    with pytest.raises(ValueError, match="shows no picture"):
        save_thumbnail([], tmp_path / "a.jpg")
