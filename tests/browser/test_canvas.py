"""The pack in the real canvas: real server, real Chromium, both node renderers."""

import re
from collections import Counter
from pathlib import Path

import pytest
from browser_helper import HOSTILE, assert_inside_its_node, newest_outputs, texts

pytestmark = [pytest.mark.browser, pytest.mark.server]

ROOT = Path(__file__).resolve().parents[2]
EVALUATIONS = 8  # of graphs.js' sampling graph


def our_nodes(server):
    return {k: v for k, v in server.get("/object_info").items() if v["python_module"] == "custom_nodes.tessera"}


def test_the_extension_loads_once_and_completely(canvas):
    ours = [(re.sub(r"\?.*", "", url.split("/extensions/")[1]), status) for url, status in canvas.requests
            if "/extensions/tessera/" in url]  # fmt: skip
    assert Counter(ours).most_common(1)[0][1] == 1
    files = {path.name for path in (ROOT / "web").iterdir() if path.suffix in (".js", ".mjs", ".css")}
    assert {"tessera.js", "tessera.css", "sidebar.mjs", "plan.mjs"} <= files
    assert set(ours) == {(f"tessera/{name}", 200) for name in files}


def test_every_node_can_be_created(canvas, server):
    info = our_nodes(server)
    assert {"TesseraTaylorCache", "TesseraRunReport", "TesseraCompare"} <= set(info)
    made = canvas.page.evaluate(
        """ids => { app.graph.clear(); return Object.fromEntries(ids.map((id) => {
            const node = LiteGraph.createNode(id); app.graph.add(node);
            return [id, { category: node.constructor.category, inputs: node.inputs.map(i => i.name),
                          values: Object.fromEntries((node.widgets ?? []).map(w => [w.name, w.value])) }]; })); }""",
        sorted(info),
    )
    for name, schema in info.items():
        assert made[name]["category"] == schema["category"] and schema["category"].startswith("Tessera/")
        declared = schema["input"].get("required", {}) | schema["input"].get("optional", {})
        grown = {k for k, v in declared.items() if v[0] == "COMFY_AUTOGROW_V3"}  # the canvas names its first sockets
        single = {k for k, v in declared.items() if not isinstance(v[0], list)} - grown
        assert set(made[name]["inputs"]) >= single
        assert all(any(i.startswith(f"{k}.") for i in made[name]["inputs"]) for k in grown)
        for key, (_, *options) in declared.items():
            if key in made[name]["values"] and options and "default" in options[0]:
                assert made[name]["values"][key] == options[0]["default"], (
                    f"{name}.{key}: the canvas changed its default"
                )
    assert not canvas.page.query_selector(".tessera-panel:not(:has(.tessera-stop))")  # nothing has run


@pytest.mark.parametrize("renderer", ["classic", "vue"])
def test_a_run_draws_the_line_and_the_report(canvas, server, renderer):
    canvas.look(renderer)
    ids = canvas.call("sampling", 1 if renderer == "classic" else 2)
    before = canvas.page.evaluate("async () => [await app.graphToPrompt(), app.graph.serialize().nodes]")
    assert not canvas.has_panel(ids["cache"], "tessera_line")
    canvas.queue()
    report, line = canvas.panel(ids["report"], "tessera_report"), canvas.panel(ids["cache"], "tessera_line")

    (record,) = newest_outputs(server)[ids["report"]]["tessera_report"]
    (feature,) = record["features"]
    kinds = [d["kind"] for d in feature["facts"]["decisions"]]
    assert len(kinds) == EVALUATIONS and {"full", "forecast"} == set(kinds)
    assert texts(line, ".tessera-line-text") == [feature["line"]]
    assert texts(report, ".tessera-feature-line") == [feature["line"]]
    for strip in (line, report):
        cells = strip.query_selector_all(".tessera-cell")
        assert [c.get_attribute("data-kind") for c in cells] == kinds
        look = {(c.get_attribute("data-kind"), c.get_attribute("height"), c.evaluate("e => getComputedStyle(e).fill"))
                for c in cells}  # fmt: skip
        assert len(look) == 2 and len({h for _, h, _ in look}) == 2 and len({f for *_, f in look}) == 2
        assert "sigma" in cells[0].evaluate("e => e.querySelector('title').textContent")
    assert texts(report, ".tessera-headline")[0].startswith(f"{EVALUATIONS} steps in ")
    assert_inside_its_node(canvas, ids["report"], report, renderer)
    canvas.shoot(f"run-{renderer}")

    prompt, nodes = canvas.page.evaluate("async () => [await app.graphToPrompt(), app.graph.serialize().nodes]")
    assert prompt["output"] == before[0]["output"]
    assert [n.get("widgets_values") or [] for n in nodes] == [n.get("widgets_values") or [] for n in before[1]]


def test_compare_draws_its_panel(canvas, server):
    canvas.look("vue", "light")
    ids = canvas.call("comparison", 3)
    canvas.queue()
    panel = canvas.panel(ids["compare"], "tessera_report")
    (report,) = newest_outputs(server)[ids["compare"]]["tessera_report"]
    assert texts(panel, "thead th") == ["a", "b"]
    headline = texts(panel, ".tessera-headline")[0]
    speed = report["speedup"]
    assert ("faster" in headline) == (speed >= 1.005) and "latent error" in headline
    rows = [row.split("Evaluations")[1] for row in texts(panel, "tbody tr") if row.startswith("Evaluations")]
    assert rows == [f"{report['a']['evaluations']}{report['b']['evaluations']}"]
    assert len(texts(panel, ".tessera-point")) == len(report["per_step_error"]) == 6
    assert texts(panel, ".tessera-side-name") == ["b"] and "Taylor Cache" in texts(panel, ".tessera-feature b")
    canvas.call("show", ids["compare"])
    canvas.shoot("compare-vue-light")


def comparison_record():
    decisions = [{"step": i, "kind": kind} for i, kind in enumerate(["full", "forecast", "reuse", HOSTILE])]
    cache = {"name": HOSTILE, "node": None, "facts": {"decisions": decisions, "peak_bytes": 2**21}, "line": HOSTILE}
    sparse = {"name": "Sparse", "facts": {"pairs_fraction": 0.25, "declined": {HOSTILE: 3}, "later": [1, {"x": 2}]}}
    side = {"label": "plain", "seconds": {"median": 4.0, "min": 3.9, "max": 4.2}, "evaluations": 4, "features": []}
    fast = {"label": HOSTILE, "seconds": {"median": 2.0}, "evaluations": 4, "pairs_fraction": 0.25,
            "peak_bytes": None, "features": [cache, sparse, None, 7], "new_key": {"deep": [1, 2]}}  # fmt: skip
    return {"kind": "compare", "a": side, "b": fast, "speedup": 2.0, "psnr": None, "ssim": 0.97, "latent_error": 0.04,
            "per_step_error": [0.0, 0.01, None, 0.04], "sigmas": [1.0, 0.7], "repeats": 3, "device": HOSTILE,
            "notes": [HOSTILE, 5, None], "version": 99}  # fmt: skip


@pytest.mark.parametrize(("renderer", "theme"), [("classic", "light"), ("vue", "dark")])
def test_strange_reports_stay_text(canvas, renderer, theme):
    canvas.look(renderer, theme)
    report = comparison_record()
    node = canvas.call("record", {"ended": "interrupted", "features": report["b"]["features"][:1]}, report)
    canvas.queue()
    panel, line = canvas.panel(node, "tessera_report"), canvas.panel(node, "tessera_line")
    assert texts(panel, ".tessera-headline") == [f"{HOSTILE} is 2.00× faster; SSIM 0.97, latent error 4 %"]
    assert texts(line, ".tessera-line-text") == [f"Interrupted {HOSTILE}"]
    assert texts(panel, "li") == [HOSTILE, "5"]
    kinds = panel.evaluate("e => [...e.querySelectorAll('.tessera-cell')].map(c => c.dataset.kind)")
    assert kinds == ["full", "forecast", "reuse", HOSTILE]
    assert panel.query_selector_all("img, script") == [] and line.query_selector_all("img, script") == []
    assert canvas.page.evaluate("window.broken") is None
    assert len(texts(panel, ".tessera-point")) == 3  # the gap has none
    assert_inside_its_node(canvas, node, panel, renderer)
    canvas.shoot(f"strange-{renderer}-{theme}")


def test_reports_of_other_shapes_do_not_break_the_page(canvas):
    for report in ({}, {"kind": "compare"}, {"kind": "later", "features": "none"}, 7, ["x"], "text"):
        node = canvas.call("record", None, report)
        canvas.queue()
        assert len(texts(canvas.panel(node, "tessera_report"), ".tessera-headline")) == 1


@pytest.mark.parametrize("renderer", ["classic", "vue"])
def test_the_keyboard_reaches_and_unfolds_a_report(canvas, renderer):
    canvas.look(renderer)
    node = canvas.call("record", None, comparison_record())
    canvas.queue()
    panel = canvas.panel(node, "tessera_report")
    height = panel.evaluate("e => e.firstElementChild.offsetHeight")
    panel.query_selector("[role=region]").focus()
    canvas.page.keyboard.press("Tab")
    assert canvas.page.evaluate("document.activeElement.tagName") == "SUMMARY"
    canvas.page.keyboard.press("Enter")
    assert panel.evaluate("e => e.querySelector('details').open")
    assert panel.evaluate("e => e.firstElementChild.offsetHeight") > height
    assert_inside_its_node(canvas, node, panel, renderer)


def test_panels_come_back(canvas, server):
    """After a reload and a run served from the cache; with a workflow loaded again; with outputs from the history."""
    ids = canvas.call("sampling", 4)
    canvas.page.evaluate("app.loadGraphData(app.graph.serialize())")  # a cleared graph gets its id when it is loaded
    canvas.queue()
    line = texts(canvas.panel(ids["cache"], "tessera_line"), ".tessera-line-text")
    canvas.page.evaluate("app.loadGraphData(app.graph.serialize())")
    assert texts(canvas.panel(ids["cache"], "tessera_line"), ".tessera-line-text") == line

    outputs = newest_outputs(server)
    canvas.reload()
    again = canvas.call("sampling", 4)
    assert again == ids and not canvas.has_panel(ids["report"], "tessera_report")
    canvas.queue()
    canvas.panel(ids["report"], "tessera_report")
    assert texts(canvas.panel(ids["cache"], "tessera_line"), ".tessera-line-text") == line

    canvas.reload()
    canvas.call("sampling", 4)
    canvas.page.evaluate("outputs => { app.nodeOutputs = outputs; }", outputs)
    assert texts(canvas.panel(ids["report"], "tessera_report"), ".tessera-feature-line") == line


def test_the_line_reaches_a_node_inside_a_subgraph(canvas):
    ids = canvas.call("sampling", 5, 4)
    inner = canvas.page.evaluate(
        """id => { const { subgraph, node } = app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)]));
        window.inner = subgraph; return [String(node.id), subgraph.nodes[0].type]; }""",
        ids["cache"],
    )
    assert inner[1] == "TesseraTaylorCache"
    canvas.queue()
    canvas.page.wait_for_function("window.inner.nodes[0].widgets.some(w => w.name === 'tessera_line')", timeout=60_000)
    report = canvas.panel(ids["report"], "tessera_report")
    assert texts(report, "header .tessera-dim")[0].startswith(f"node {inner[0]}:")


def test_equal_nodes_each_get_their_line(canvas):
    """Two nodes of the same settings have the same cached result in ComfyUI, unless their schema says not_idempotent."""
    first, second = canvas.call("twins", 6, 2)
    canvas.queue()
    assert canvas.panel(first["cache"], "tessera_line") and canvas.panel(second["cache"], "tessera_line")
