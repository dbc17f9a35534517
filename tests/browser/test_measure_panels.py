"""The panels of Plan and of Profile Model, in both node renderers."""

import pytest
from browser_helper import HOSTILE, assert_inside_its_node, texts

pytestmark = [pytest.mark.browser, pytest.mark.server]

BLANK = {"node": None, "blocks": None, "of": None, "percent": None, "sigma": None, "state": "acts", "why": ""}


def plan_record():
    rows = [
        {"order": 1, "stage": "weights", "when": "once, as the weights are loaded", "owner": "ComfyUI", "name": "LoRA",
         "does": "304 weights at strength 1; added to the weights"},
        {"order": 2, "stage": "attention", "when": "at every attention call", "owner": "Tessera", "name": "Local Window Attention",
         "node": "5", "does": "radius 2", "blocks": "1-2,18", "of": 19, "percent": [0.2, 1.0], "sigma": [0.9, 0.0]},
        {"order": 3, "stage": "attention", "when": "at every attention call", "owner": "KJNodes", "name": HOSTILE,
         "does": "overrides every attention call that reaches it", "state": "inactive", "why": HOSTILE},
    ]  # fmt: skip
    return {
        "kind": "plan", "architecture": "Flux", "known": True, "blocks": 19, "grid": [1, 64, 64], "limits": {},
        "headline": "1 Tessera node and 2 patches of others will act on this Flux", "rows": [{**BLANK, **row} for row in rows],
        "declined": ["a declines b"], "conflicts": [HOSTILE], "refused": [], "lines": [],
    }  # fmt: skip


def profile_record(blocks=19):
    row = {
        "share": 0.25,
        "seconds": 0.25,
        "flops": 1e13,
        "flops_share": 0.25,
        "bytes": 1e9,
        "calls": 57,
        "intensity": 200.0,
    }
    kinds = ("attention", "linear", "norm", "other")
    return {
        "kind": "profile", "mode": "events", "architecture": "Flux", "known": True, "blocks": blocks, "device": "H100",
        "bottleneck": "attention", "why": HOSTILE, "conditions": "joined", "step_flops": 7.44e13, "step_seconds": 1.0,
        "plain_step_seconds": 0.9, "computed_share": 0.5, "classes": dict.fromkeys(kinds, row),
        "by_block": [{"block": i, "seconds": 0.01 * i, "share": i / 190, "flops": 1e12, "flops_share": 0.05} for i in range(blocks)],
        "attention": [{"queries": 4608, "keys": 4608, "calls": 57, "share": 1.0}],
        "steps": [{"step": i, "kind": kind, "seconds": 1.0} for i, kind in enumerate(("full", "forecast", "region"))],
        "memory": {"weights": 2**34, "peak": 2**35}, "outside": {"vae": 0.5},
        "advice": [{"node": "Log-Linear Sparse Attention", "why": HOSTILE}], "notes": ["a note"], "lines": [],
    }  # fmt: skip


@pytest.mark.parametrize(("renderer", "theme"), [("classic", "dark"), ("vue", "light")])
def test_the_plan_is_a_list_in_order_with_a_strip_of_blocks(canvas, renderer, theme):
    canvas.look(renderer, theme)
    node = canvas.call("record", None, plan_record())
    canvas.queue()
    panel = canvas.panel(node, "tessera_report")
    assert texts(panel, ".tessera-headline") == ["1 Tessera node and 2 patches of others will act on this Flux"]
    assert texts(panel, ".tessera-planned header b") == ["1. LoRA", "2. Local Window Attention", f"3. {HOSTILE}"]
    assert texts(panel, ".tessera-stage > .tessera-side-name") == [
        "once, as the weights are loaded",
        "at every attention call",
    ]
    full = panel.evaluate("e => [...e.querySelectorAll('.tessera-block-strip rect')].map(r => r.classList[0])")
    assert [i for i, name in enumerate(full) if name == "tessera-full"] == [1, 2, 18] and len(full) == 19
    assert "20 % to 100 % of the schedule" in texts(panel, ".tessera-feature-line")[1]
    assert texts(panel, "section[data-part] .tessera-side-name") == ["In conflict", "Declined"]
    assert panel.query_selector_all("img, script") == [] and canvas.page.evaluate("window.broken") is None
    assert_inside_its_node(canvas, node, panel, renderer)
    canvas.call("show", node)
    canvas.shoot(f"plan-{renderer}")


@pytest.mark.parametrize(("renderer", "theme"), [("classic", "light"), ("vue", "dark")])
def test_a_profile_is_bars_a_strip_and_what_to_try(canvas, renderer, theme):
    canvas.look(renderer, theme)
    node = canvas.call("record", None, profile_record())
    canvas.queue()
    panel = canvas.panel(node, "tessera_report")
    assert texts(panel, ".tessera-headline") == ["Flux: attention is the bottleneck"]
    assert texts(panel, ".tessera-compare tbody th") == ["attention", "linear", "norm", "other"]
    widths = panel.evaluate("e => [...e.querySelectorAll('.tessera-compare .tessera-bar')].map(b => b.style.width)")
    assert widths == ["25%"] * 8
    strips = panel.query_selector_all("svg.tessera-strip")
    assert [len(s.query_selector_all("rect")) for s in strips] == [19, 3]
    assert "74.4 TFLOP a step" in panel.inner_text() and "Log-Linear Sparse Attention" in panel.inner_text()
    assert panel.query_selector_all("img, script") == [] and canvas.page.evaluate("window.broken") is None
    assert_inside_its_node(canvas, node, panel, renderer)
    canvas.call("show", node)
    canvas.shoot(f"profile-{renderer}")


def test_strange_parts_are_passed_over(canvas):
    for report, headline in (
        ({"kind": "plan", "rows": [None, 7, {"of": 1e9, "blocks": "0-99999999"}, {"of": 3, "blocks": HOSTILE}]}, "Plan"),
        ({"kind": "plan", "rows": {}, "declined": 3, "headline": HOSTILE}, HOSTILE),
        ({"kind": "profile", "classes": [1], "by_block": "x", "steps": {}, "advice": [None], "memory": 3}, "Profile"),
        ({**profile_record(2), "by_block": [None, {"share": HOSTILE}], "attention": [HOSTILE]}, "Flux: attention is the bottleneck"),
    ):  # fmt: skip
        node = canvas.call("record", None, report)
        canvas.queue()
        panel = canvas.panel(node, "tessera_report")
        assert texts(panel, ".tessera-headline") == [headline]
        assert panel.query_selector_all("img, script") == [] and canvas.page.evaluate("window.broken") is None
