"""The masks in Run Report's panel and the panel of Attention Probe, in both node renderers."""

import base64

import pytest
from browser_helper import HOSTILE, LEVELS, assert_inside_its_node, mask_of, newest_outputs, probe_record, texts

pytestmark = [pytest.mark.browser, pytest.mark.server]

ALPHAS = """e => { const data = e.getContext("2d").getImageData(0, 0, e.width, e.height).data;
    return [e.width, e.height, [...data].filter((_, i) => i % 4 === 3)]; }"""


def opacity(shade):
    return round((shade / 255) ** 0.5 * 255)


@pytest.mark.parametrize("renderer", ["classic", "vue"])
def test_a_run_of_sparse_attention_draws_its_mask(canvas, server, renderer):
    canvas.look(renderer, "light" if renderer == "vue" else "dark")
    ids = canvas.call("sparse", 21 if renderer == "classic" else 22)
    canvas.queue()
    panel = canvas.panel(ids["report"], "tessera_report")
    (record,) = newest_outputs(server)[ids["report"]]["tessera_report"]
    (feature,) = record["features"]
    mask = feature["mask"]
    shades = list(base64.b64decode(mask["cells"]))
    assert len(set(shades)) > 2 and "mask" not in feature["facts"]
    width, height, alphas = panel.query_selector("canvas.tessera-mask").evaluate(ALPHAS)
    assert (height, width) == (mask["rows"], mask["columns"]) and alphas == [opacity(s) for s in shades]
    assert texts(panel, ".tessera-mask-figure figcaption > div")[0] == mask["caption"]
    assert mask["caption"].startswith("Step 3 of 3, block ")
    seen = panel.query_selector("canvas.tessera-mask").evaluate("e => [e.offsetWidth, e.offsetHeight]")
    assert seen[0] == seen[1] >= 150
    assert canvas.panel(ids["window"], "tessera_line").query_selector("canvas") is None
    assert_inside_its_node(canvas, ids["report"], panel, renderer)
    canvas.call("show", ids["report"])
    canvas.shoot(f"mask-{renderer}")


def test_masks_of_other_shapes_are_left_out_and_words_stay_text(canvas):
    good = mask_of(2, 3, [0, 1, 64, 128, 200, 255], HOSTILE)
    strange = [
        {**good, "rows": 3}, {**good, "cells": "%%%"}, {**good, "rows": 10**6, "columns": 10**6}, {**good, "rows": 1.5},
        {**good, "columns": -3, "rows": -2}, {**good, "rows": "2"}, {}, 7, None, [good], HOSTILE,
    ]  # fmt: skip
    features = [{"name": f"F{i}", "facts": {}, "line": "", "mask": mask} for i, mask in enumerate([good, *strange])]
    node = canvas.call("record", None, {"kind": "run", "features": features})
    canvas.queue()
    panel = canvas.panel(node, "tessera_report")
    assert len(texts(panel, "section")) == len(features)
    (drawn,) = panel.query_selector_all("canvas")
    assert drawn.evaluate(ALPHAS) == [3, 2, [0, 16, 128, 181, 226, 255]]
    assert drawn.get_attribute("aria-label") == f"Attention mask. {HOSTILE}"
    assert panel.query_selector_all("img, script") == [] and canvas.page.evaluate("window.broken") is None


@pytest.mark.parametrize(("renderer", "theme"), [("classic", "dark"), ("vue", "light")])
def test_the_probe_says_what_to_set_and_draws_its_map(canvas, renderer, theme):
    canvas.look(renderer, theme)
    report = probe_record()
    node = canvas.call("record", None, report)
    canvas.queue()
    panel = canvas.panel(node, "tessera_report")
    assert texts(panel, ".tessera-headline") == ["Set density 0.6 to keep 90 % of the attention"]
    cells = panel.query_selector_all(".tessera-map .tessera-kept")
    assert len(cells) == 40 * 4
    expected = [
        ["none" if kept is None else str(LEVELS.index(kept)) for kept in b["by_step"]] for b in report["blocks"]
    ]
    assert [c.get_attribute("data-keeps") for c in cells] == sum(expected, [])
    fills = {(c.get_attribute("data-keeps"), c.evaluate("e => getComputedStyle(e).fill")) for c in cells[:20]}
    assert len(fills) == len({fill for _, fill in fills}) == 6, "each share has its colour"
    swatches = panel.evaluate(
        "e => [...e.querySelectorAll('.tessera-swatch')].map(s => [s.dataset.keeps, getComputedStyle(s).backgroundColor])"
    )
    assert set(map(tuple, swatches)) == fills - {x for x in fills if x[0] == "none"}
    assert texts(cells[1], "title") == ["block 0, step 8: 60 %"] and texts(cells[13], "title")[0].endswith(
        "not measured"
    )
    assert texts(panel, ".tessera-suggested") == ["0.6 suggested90.3 %"]
    assert texts(panel, ".tessera-ladder th[scope=row]")[3] == "0.25 in the map"
    assert texts(panel, "li") == report["notes"]
    names = [e.bounding_box() for e in panel.query_selector_all(".tessera-map-steps span")]
    for name, box in zip(names, (c.bounding_box() for c in cells[:4]), strict=True):
        assert abs(name["y"] + name["height"] / 2 - box["y"] - box["height"] / 2) < 2, "names stand beside their rows"
    assert cells[-1].bounding_box()["x"] - cells[0].bounding_box()["x"] > 200
    canvas.shoot(f"probe-{renderer}-{theme}")
    panel.query_selector("summary").click()
    rows = panel.evaluate(
        "e => [...e.querySelectorAll('.tessera-blocks tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    assert len(rows) == 40 and rows[0] == ["0", "20 %", "60 %", "85 %", "93 %", "20 %", "0.1"]
    assert rows[3][2] == "–" and rows[3][-1] == "–"
    assert_inside_its_node(canvas, node, panel, renderer)


def test_the_probe_panel_without_an_answer_and_with_strange_parts(canvas):
    for report, headline in (
        ({**probe_record(4, (0, 2), "window", "radius"), "suggested": None, "wanted": 0.99},
         "No radius of this pattern keeps 99 % of the attention"),
        ({**probe_record(5, (3, 4), "window", "radius"), "lines": [HOSTILE, 7, None]},
         "Set radius 0.6 (density 0.006) to keep 90 % of the attention"),
        ({"kind": "probe", "lines": [HOSTILE], "blocks": 7, "steps": {}, "ladder": [None, {"value": HOSTILE}]}, HOSTILE),
        ({"kind": "probe", "blocks": [None, {"block": HOSTILE, "by_step": "x"}], "steps": [HOSTILE]}, "Attention Probe"),
    ):  # fmt: skip
        node = canvas.call("record", None, report)
        canvas.queue()
        panel = canvas.panel(node, "tessera_report")
        assert texts(panel, ".tessera-headline") == [headline]
        assert panel.query_selector_all("img, script") == [] and canvas.page.evaluate("window.broken") is None
