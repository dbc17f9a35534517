"""Every template runs through a real server, and refuses what is wrong before it runs."""

import json
from pathlib import Path

import pytest
from canvas import bare, complete, entries, is_link, models, needs, to_api, to_canvas, told
from PIL import Image, ImageStat
from stand_ins import write

import tessera

pytestmark = pytest.mark.server

ROOT = Path(__file__).resolve().parents[2]
TWINS = sorted((ROOT / "workflows/api").glob("*.json"))
NEEDING = {  # templates on official weights: width of the stand-in's conditioning, of its pooled vector, and what is told
    "load_clear_weights": (96, 64, {"Load CLEAR Weights": "radius 16, down_factor 4", "Local Window Attention": "served 8 of 8"}),
    "apply_easycontrol": (96, 64, {"Apply EasyControl": "1,024 condition tokens, 1 passes for 2 calls"}),
    "apply_pose_control": (96, 0, {"Apply Pose Control": "pose in 2 calls of the model, 2 chains computed"}),
    "load_quantized_model": (96, 64, {"Taylor Cache": "forecast 1 of 2 evaluations"}),
    "load_linfusion": (768, 0, {"Load LinFusion": "self-attention calls linear, in 7 modules"}),
    "load_diffusers_model": (96, 0, {"Taylor Cache": "forecast 1 of 2 evaluations"}),
    "load_sana_video": (96, 0, {"Taylor Cache": "forecast 1 of 2 evaluations"}),
    "block_linear_video_sampler": (96, 0, {"Block Linear Video Sampler": "went on from 51 frames"}),
    "balanced_lora_stack": (96, 64, {}),
    "lora_orthogonality_report": (96, 64, {}),
    "calibrate_lora_strength": (96, 64, {}),
    "llm_prompt_options": (96, 768, {}),
    "apply_dit4sr": (96, 64, {"Apply DiT4SR": "24 low-resolution tokens beside the picture in 2 of 2 calls",
                              "Tiled Latents": "one tile covers the latent of 12 x 8"}),
    "apply_relactrl": (4096, 0, {"Apply RelaCtrl": "22 control blocks in 2 model calls, fixed permutation"}),
    "control_relevance": (96, 64, {"Control Relevance": "matters most of 3 residuals"}),
    "select_control_layers": (96, 64, {"Control Relevance": "matters most of 3 residuals"}),
    "ltx_denoising_decode": (48, 0, {}),
    "class_label": (0, 0, {"Taylor Cache": "forecast 1 of 2 evaluations"}),
}  # fmt: skip
ENCODERS = ("CLIPLoader", "DualCLIPLoader", "TesseraLlmPromptOptions")
PLANNED = ("TesseraCacheSchedule", "TesseraSolveThreshold", "TesseraControlRelevance")
CARRIED = [path for path in TWINS if path.stem not in NEEDING]
FEW = 2  # sampler steps: enough to run every node, too few for a good picture


def quick(graph):
    """The graph with few sampler steps; as many as there must be where a schedule is planned."""
    if any(n["class_type"] == "TesseraLoadCacheProfile" for n in graph.values()):
        return graph  # the profile that comes along is of so many steps
    planned = any(n["class_type"] in PLANNED for n in graph.values())
    for node in graph.values():
        if isinstance(node["inputs"].get("steps"), int):
            node["inputs"]["steps"] = min(8 if planned else FEW, node["inputs"]["steps"])
        if isinstance(node["inputs"].get("record_steps"), int):
            node["inputs"]["record_steps"] = min(FEW, node["inputs"]["record_steps"])
        if isinstance(node["inputs"].get("repeats"), int):
            node["inputs"]["repeats"] = 1
    return graph


@pytest.fixture(scope="module")
def info(server):
    return server.get("/object_info")


@pytest.mark.parametrize("path", CARRIED, ids=lambda p: p.stem)
def test_runs_and_shows_pictures(server, path):
    entry = server.run(quick(json.loads(path.read_text())))
    shows_pictures(server, entry)


def shows_pictures(server, entry):
    assert entry["status"]["status_str"] == "success"
    files = [p for p in server.outputs(entry) if p.suffix in (".png", ".webp", ".jpg")]
    assert files
    for file in files:
        with Image.open(file) as picture:
            assert max(ImageStat.Stat(picture.convert("L")).stddev) > 1, f"{file.name} is one colour"


@pytest.mark.parametrize("path", TWINS, ids=lambda p: p.stem)
def test_twin_is_complete_and_converts(info, path):
    """The API file names every widget as the canvas would, and the converter makes a canvas that says the same."""
    graph = json.loads(path.read_text())
    assert complete(graph, info) == graph, "run `make node-assets`"
    canvas = to_canvas(path.stem, graph, info, "0")
    assert to_api(canvas) == bare(graph) and told(canvas) == needs(graph)


def on_stand_ins(graph, width, pooled):
    """The graph without text encoders, small, with windows at any size and caches that forecast at once."""
    square = any(node["class_type"] == "TesseraClassLabel" for node in graph.values())  # others are refused
    small = {"width": 64, "height": 64 if square else 96, "min_tokens": 0, "radius": 3, "warmup": 0, "tail_full": 0}
    if any(node["class_type"] == "TesseraApplyRelactrl" for node in graph.values()):
        small |= {"width": 512, "height": 32}  # PixArt divides by zero where the mean of both is smaller
    masked = any(node["class_type"] == "LTXVConditioning" for node in graph.values())
    text = {"width": width, "pooled": pooled, "masked": masked}
    for seed, (key, node) in enumerate(graph.items()):
        if node["class_type"] == "CLIPTextEncode":
            graph[key] = {"class_type": "StandInText", "inputs": {**text, "seed": seed}}
        node["inputs"] |= {name: value for name, value in small.items() if name in node["inputs"]}
    return quick({key: node for key, node in graph.items() if node["class_type"] not in ENCODERS})


def mistakes(graph, info):
    """Links of another type than their input, and choices that are not on the list."""
    found = []
    for key, node in graph.items():
        for entry in entries(info[node["class_type"]]["input"], node["inputs"]):
            value = node["inputs"].get(entry.name)
            if is_link(value):
                kind = info[graph[value[0]]["class_type"]]["output"][value[1]]
                found += [f"{key}.{entry.name}: {kind}"] * (kind != entry.type)
            elif entry.type == "COMBO":
                found += [f"{key}.{entry.name}: {value}"] * (value not in entry.options["options"])
    return found


@pytest.mark.parametrize("name", NEEDING)
def test_what_needs_official_weights_runs_on_stand_ins(server, name):
    path = ROOT / f"workflows/api/{name}.json"
    graph = json.loads(path.read_text())
    here = server.base / "models"
    lacking = [weight for weight in needs(graph) if not (here / weight["directory"] / weight["name"]).exists()]
    expected = models(weight["name"] for weight in lacking)  # what another of these tests wrote is there
    missing = {mistake.rpartition(": ")[2] for mistake in mistakes(graph, server.get("/object_info"))}
    assert len(missing) == len(expected), "nothing else is missing"
    write(needs(graph), here, tessera)
    assert mistakes(graph, server.get("/object_info")) == []
    width, pooled, lines = NEEDING[name]
    entry = server.run(on_stand_ins(graph, width, pooled))
    shows_pictures(server, entry)
    reports = [r for out in entry["outputs"].values() for r in out.get("tessera_report", [])]
    features = [feature for report in reports for feature in report.get("features", [])]
    assert all(feature["facts"].get("plain", 0) == 0 for feature in features)
    told_lines = {feature["name"]: feature["line"] for feature in features}
    assert told_lines.keys() == lines.keys()
    for feature, line in lines.items():
        assert line in told_lines[feature]


def test_every_template_runs_or_names_its_weights():
    assert {path.stem for path in TWINS if needs(json.loads(path.read_text()))} == NEEDING.keys()


def image_graph():
    return json.loads((ROOT / "workflows/api/digits_image.json").read_text())


def prompt_of(graph):
    return next(n for n in graph.values() if n["class_type"] == "TesseraDigitsPrompt" and n["inputs"]["text"])


def test_unknown_word_is_refused_before_the_graph_runs(server, harness):
    graph = quick(image_graph())
    prompt_of(graph)["inputs"]["text"] = "a cat"
    with pytest.raises(harness.GraphError, match="does not know 'a'"):
        server.run(graph)


def test_unknown_word_from_a_linked_text_is_refused_when_it_arrives(server, harness):
    graph = quick(image_graph())
    graph["90"] = {"class_type": "PrimitiveString", "inputs": {"value": "seven flying"}}
    prompt_of(graph)["inputs"]["text"] = ["90", 0]
    with pytest.raises(harness.GraphError, match="does not know 'flying'"):
        server.run(graph)


def test_encode_undoes_decode_through_the_server(server):
    """Denoise 0.0001 from an encoded picture gives that picture back."""
    graph = quick(image_graph())
    sampler = next(n for n in graph.values() if n["class_type"] == "KSampler")
    decoder = next(key for key, n in graph.items() if n["class_type"] == "TesseraDigitsDecode")
    saver = next(n for n in graph.values() if n["class_type"] == "SaveImage")
    graph["91"] = {"class_type": "TesseraDigitsEncode", "inputs": {"image": [decoder, 0], "kind": "image", "frames": 8}}
    graph["92"] = {"class_type": "TesseraDigitsDecode", "inputs": {"samples": ["91", 0]}}
    graph["93"] = {"class_type": "SaveImage", "inputs": {"images": ["92", 0], "filename_prefix": "again"}}
    sampler["inputs"]["seed"] += 1
    entry = server.run(graph)
    first, again = (entry["outputs"][key]["images"] for key in (_key(graph, saver), "93"))
    assert len(first) == len(again) > 0
    for a, b in zip(server.outputs({"outputs": {"a": {"images": first}}}),
                    server.outputs({"outputs": {"b": {"images": again}}}), strict=True):  # fmt: skip
        assert Image.open(a).tobytes() == Image.open(b).tobytes()


def _key(graph, node):
    return next(key for key, value in graph.items() if value is node)
