"""What the server offers with the pack: templates and help pages; and each workflow in the canvas: it equals its API
twin, and no node covers another, before a run or after it."""

import json
from itertools import combinations
from pathlib import Path

import pytest
from browser_helper import mask_of, probe_record
from PIL import Image

pytestmark = [pytest.mark.browser, pytest.mark.server]

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
MASKED = {f"Tessera{name}Attention" for name in ("LocalWindow", "SparseLinear", "LogLinearSparse", "Diagonal")}
MASKED |= {"TesseraAttentionTile", "TesseraWindowAttention3d", "TesseraRettention"}
PANELS = {
    "TesseraCompare": 400,
    "TesseraRunReport": 100,
    "TesseraAttentionProbe": 400,
}  # pixels by which a report makes its node grow, at the least


def test_templates_are_listed_with_thumbnails(server):
    assert WORKFLOWS, "workflows/ holds no template"
    assert sorted(server.get("/workflow_templates")["tessera"]) == [path.stem for path in WORKFLOWS]
    for path in WORKFLOWS:
        assert server.get(f"/api/workflow_templates/tessera/{path.name}") == json.loads(path.read_text("utf-8"))
        assert server.get(f"/api/workflow_templates/tessera/{path.stem}.jpg")[:3] == b"\xff\xd8\xff"


def test_every_node_has_a_help_page(server):
    info = server.get("/object_info")
    ours = [name for name, schema in info.items() if schema["python_module"] == "custom_nodes.tessera"]
    missing = [name for name in ours if not (ROOT / "web" / "docs" / f"{name}.md").is_file()]
    assert ours and not missing
    for name in ours:
        page = server.get(f"/extensions/tessera/docs/{name}.md").decode()
        assert info[name]["display_name"] in page.splitlines()[0], f"{name}.md does not begin with the node's name"


def test_workflows_load_and_equal_their_api_twins(canvas, server):
    assert WORKFLOWS, "workflows/ holds no template"
    for path in WORKFLOWS:
        twin = json.loads((ROOT / "workflows" / "api" / path.name).read_text("utf-8"))
        prompt = canvas.page.evaluate(
            "async (w) => { await app.loadGraphData(w); return (await app.graphToPrompt()).output; }",
            json.loads(path.read_text("utf-8")),
        )
        canvas.page.keyboard.press("Escape")
        info = server.get("/object_info")
        assert plain(prompt, info) == plain(twin, info), f"{path.name} and its API twin differ"


def plain(prompt, info):
    """Class types and inputs; optional widgets that an API graph leaves out at the defaults that the canvas sends."""
    nodes = {}
    for name, node in prompt.items():
        optional = info[node["class_type"]]["input"].get("optional", {})
        defaults = {k: v[1]["default"] for k, v in optional.items() if len(v) > 1 and "default" in v[1]}
        nodes[name] = {"class_type": node["class_type"], "inputs": defaults | node["inputs"]}
    return nodes


def side(label, features):
    """One side of a comparison, or what a run says of itself, with the longest words that are usual."""
    return {"label": label, "seconds": {"median": 103.4, "min": 98.7, "max": 117.1}, "steps": 25, "evaluations": 1025,
            "forwards": 1025, "blocks_total": 41000, "blocks_computed": 12000, "blocks_skipped": 29000,
            "pairs_fraction": 0.2268, "held_bytes": 2**32, "peak_bytes": 2**34, "architecture": "HunyuanVideo15",
            "features": features}  # fmt: skip


def outputs_of_a_run(workflow):
    """What a run of this workflow gives its nodes: reports with every part that they can have, and pictures."""
    served = "served 20000 of 41000 calls, 22.7% of pairs; 21000 declined: outside the chosen steps"
    patches = [n for n in workflow["nodes"] if n["type"].startswith("Tessera")]
    patches = [n["type"] for n in patches if any(slot["type"] == "MODEL" for slot in n.get("outputs") or ())]
    lines = dict.fromkeys(patches, served)
    lines["TesseraTaylorCache"] = "forecast 1017 of 1025 evaluations, held 12288.4 MiB"
    decisions = [{"step": i, "sigma": 1 - i / 25, "kind": "forecast" if i % 5 else "full"} for i in range(25)]
    caption = "Step 25 of 25, block 56, all heads alike. Rows are queries, columns keys: tokens as the model has them. "
    caption += "Computed are whole blocks of tokens, wherever they hold one of these pairs. Pooled keys are not drawn."
    mask = mask_of(96, 96, bytes(96 * 96), caption)
    features = [
        {"name": node["type"], "node": str(node["id"]), "line": lines[node["type"]],
         "facts": {"decisions": decisions, "pairs_fraction": 0.2268}}
        for node in workflow["nodes"] if node["type"] in lines
    ]  # fmt: skip
    masked = [{**entry, "mask": mask} if entry["name"] in MASKED else entry for entry in features]
    run = {**side("", masked), "kind": "run", "seconds": 103.4, "ended": "finished"}
    notes = ["b gave different latents on repeats with the same seed", "the latent of b has values that are not finite"]
    notes += ["timed 2 times each; 3 repeats or more give a steadier ratio"]
    compare = {"kind": "compare", "a": side("a", []), "b": side("b", features), "speedup": 12.34, "psnr": 128.9189,
               "ssim": 0.962936, "latent_error": 0.082216, "identical": False, "repeats": 2, "notes": notes,
               "per_step_error": [i / 100 for i in range(25)], "sigmas": [1 - i / 25 for i in range(26)],
               "device": "cuda: NVIDIA RTX PRO 6000 Blackwell Workstation Edition"}  # fmt: skip
    tall, wide = ({"filename": f"{name}.png", "subfolder": "", "type": "input"} for name in ("tall", "wide"))
    made = {
        "TesseraRunReport": {"tessera_report": [run]},
        "TesseraCompare": {"tessera_report": [compare]},
        "TesseraAttentionProbe": {"tessera_report": [probe_record()]},
        "SaveImage": {"images": [tall, wide, tall, wide]},
        "SaveAnimatedWEBP": {"images": [{**tall, "filename": "tall.webp"}], "animated": [True]},
    }
    return {str(node["id"]): made[node["type"]] for node in workflow["nodes"] if node["type"] in made}


def settled(canvas):
    """The boxes of all nodes, once they stay the same."""
    boxes = canvas.call("boxes")
    for _ in range(60):
        canvas.page.wait_for_timeout(500)
        boxes, earlier = canvas.call("boxes"), boxes
        if boxes == earlier:
            return boxes
    pytest.fail("the nodes never came to rest")


def covering(boxes):
    return [(a[0], b[0]) for a, b in combinations(boxes, 2)
            if a[1] < b[3] and b[1] < a[3] and a[2] < b[4] and b[2] < a[4]]  # fmt: skip


@pytest.mark.parametrize("renderer", ["classic", "vue"])
def test_no_node_covers_another_before_or_after_a_run(canvas, server, renderer):
    for name, size in (("tall", (96, 192)), ("wide", (384, 96))):
        Image.new("RGB", size, "white").save(server.base / "input" / f"{name}.png")
    frame = Image.new("RGB", (96, 192))
    frame.save(server.base / "input" / "tall.webp", save_all=True, append_images=[Image.new("RGB", (96, 192), "white")])
    canvas.look(renderer)
    for path in WORKFLOWS:
        workflow = json.loads(path.read_text("utf-8"))
        outputs = outputs_of_a_run(workflow)
        canvas.page.evaluate("w => app.loadGraphData(w)", workflow)
        canvas.page.keyboard.press("Escape")
        canvas.call("overview", 700)
        before = settled(canvas)
        assert covering(before) == [], path.name
        canvas.call("executed", outputs)
        for key in (key for key, output in outputs.items() if "tessera_report" in output):
            canvas.panel(key, "tessera_report")
        pictures = [key for key, output in outputs.items() if "images" in output]
        canvas.page.wait_for_function("ids => tesseraTest.pictured(ids)", arg=pictures, timeout=60_000)
        after = settled(canvas)
        canvas.shoot(f"{path.stem}-{renderer}")
        assert covering(after) == [], path.name
        grown = {kind: b[3] - a[3] for (kind, *b), (_, *a) in zip(after, before, strict=True)}
        drawn = {kind: grown[kind] > least for kind, least in PANELS.items() if kind in grown}
        assert all(drawn.values()), f"{path.name}: the panels were not drawn: {drawn}"
