"""The sidebar: what a run on the digits model did at every step, by mouse and by keyboard, in both node renderers."""

import pytest
from browser_helper import HOSTILE, newest_outputs, texts

pytestmark = [pytest.mark.browser, pytest.mark.server]

STEPS = 10
SHOWN = "() => document.querySelector('.tessera-sidebar')?.checkVisibility()"
ENDED = "() => document.querySelector('.tessera-sidebar .tessera-headline')?.dataset.ended === '{}'"
KINDS = ".tessera-steps .tessera-cell[data-kind]"


def opened(canvas, ended="finished"):
    """The sidebar, opened by its key, once the newest run has ended so."""
    if not canvas.page.evaluate(SHOWN):
        canvas.page.keyboard.press("t")
    canvas.page.wait_for_function(SHOWN)
    if ended:
        canvas.page.wait_for_function(ENDED.format(ended), timeout=60_000)
    return canvas.page.query_selector(".tessera-sidebar")


def tell(canvas, event, **detail):
    canvas.page.evaluate(
        "([event, detail]) => app.api.dispatchCustomEvent(event, detail)", [f"tessera.{event}", detail]
    )


@pytest.mark.parametrize(("renderer", "theme"), [("classic", "dark"), ("vue", "light")])
def test_a_run_is_drawn_read_and_found_again(canvas, server, renderer, theme):
    canvas.look(renderer, theme)
    ids = canvas.call("digits", 31 if renderer == "classic" else 32, STEPS)
    side = opened(canvas, None)
    assert "between Load Diffusion Model and KSampler" in texts(side, ".tessera-empty")[0]
    assert not side.query_selector("select").is_visible()
    canvas.queue()
    opened(canvas)
    canvas.panel(ids["report"], "tessera_report")
    (record,) = newest_outputs(server)[ids["report"]]["tessera_report"]
    (feature,) = record["features"]
    kinds = [d["kind"] for d in feature["facts"]["decisions"]]
    drawn = [cell.get_attribute("data-kind") for cell in side.query_selector_all(KINDS)]
    assert drawn == kinds and len(kinds) == record["evaluations"] == STEPS and set(kinds) == {"full", "forecast"}
    assert texts(side, ".tessera-headline")[0].startswith(f"{STEPS} steps in ")
    letters = [path.get_attribute("data-kind") for path in side.query_selector_all(".tessera-blocks-map path")]
    assert letters == ["c", "f", "p"]
    fills = side.evaluate("e => [...e.querySelectorAll('.tessera-blocks-map path')].map(p => getComputedStyle(p).fill)")
    assert len(set(fills)) == 3
    assert texts(side, ".tessera-feature-line") == [feature["line"]]

    assert canvas.page.evaluate("document.activeElement.classList.contains('tessera-sidebar')")
    for _ in range(2):  # the picker of runs, the time line
        canvas.page.keyboard.press("Tab")
    assert canvas.page.evaluate("document.activeElement.getAttribute('role')") == "slider"
    for key, step in [("Home", 1), ("ArrowRight", 2), ("End", STEPS), ("ArrowRight", STEPS), ("ArrowLeft", STEPS - 1)]:
        canvas.page.keyboard.press(key)
        (words,) = texts(side, ".tessera-readout")
        assert words.startswith(f"Step {step} of {STEPS}: {'computed' if kinds[step - 1] == 'full' else 'forecast'}, ")
    canvas.shoot(f"sidebar-{renderer}-{theme}")
    canvas.page.evaluate("app.canvas.ds.offset = [9000, 9000]")
    canvas.page.keyboard.press("Tab")
    assert canvas.page.evaluate("document.activeElement.textContent") == "Taylor Cache"
    canvas.page.keyboard.press("Enter")
    selected = canvas.page.evaluate("[...app.canvas.selectedItems].map(item => String(item.id))")
    assert selected == [ids["cache"]] and canvas.page.evaluate("Math.abs(app.canvas.ds.offset[0]) < 2000")

    canvas.reload()
    side = opened(canvas)
    assert [cell.get_attribute("data-kind") for cell in side.query_selector_all(KINDS)] == kinds
    assert len(side.query_selector_all("option")) == 1


def told(run, kinds, start=0, **more):
    """A step's event after these evaluations, the last of which goes on."""
    columns = [[start + i, 0.5, kind, 0.25] for i, kind in enumerate(kinds)]
    columns[-1][3] = None
    blocks = ["cccc" if kind == "full" else "cppf" for kind in kinds]
    timeline = {"from": start, "columns": columns, "blocks": blocks, "missed": 0}
    known = {"run": run, "at": 1.7e9, "steps": 8, "expected": None, "position": len(kinds) - 1, "architecture": "Flux"}
    return {**known, "sampling": 0.5, "elapsed": 0.75, "timeline": timeline, **more}


def test_a_run_grows_and_its_end_is_told(canvas):
    side = opened(canvas, None)
    tell(canvas, "step", **told("a", ["full"], features=[{"name": HOSTILE, "node": "4"}]))
    canvas.page.wait_for_function(ENDED.format("running"))
    assert texts(side, ".tessera-section button") == [HOSTILE]
    tell(canvas, "step", **told("a", ["full", "forecast", HOSTILE]))
    canvas.page.wait_for_function("() => document.querySelectorAll('.tessera-steps [data-kind]').length === 3")
    assert "Step 3 of 8: " in texts(side, ".tessera-headline")[0] and " left" in texts(side, ".tessera-headline")[0]
    assert side.query_selector("progress").evaluate("e => e.value") == 0.25
    assert side.query_selector(".tessera-steps").evaluate("e => e.viewBox.baseVal.width") == 80  # eight are to come
    side.query_selector(".tessera-pictures").focus()
    canvas.page.keyboard.press("End")
    assert texts(side, ".tessera-readout")[0].startswith("Step 3 of 8: being computed")
    canvas.page.evaluate("app.api.dispatchCustomEvent('reconnecting')")
    canvas.page.wait_for_function(ENDED.format("error"))
    assert texts(side, ".tessera-headline")[0].startswith("Connection lost at step 3 of 8")

    declined = {"why": HOSTILE, "count": 3, "remedy": "Lower min_tokens."}
    feature = {"name": "Sparse", "node": "4", "facts": {"peak_bytes": 2**20}, "line": HOSTILE, "declined": [declined]}
    memory = {"device": "cuda:0", "peak": 2**30, "own": False}
    record = told("a", ["reuse"], 2, ended="interrupted", seconds=1.5, features=[feature], memory=memory)
    tell(canvas, "run", **record)
    canvas.page.wait_for_function(ENDED.format("interrupted"))
    assert texts(side, ".tessera-headline") == ["Interrupted at step 3 of 8 after 1.5 s"]
    assert not side.query_selector("progress").is_visible()
    assert canvas.page.evaluate("document.activeElement.getAttribute('role')") == "slider"  # where it was
    assert texts(side, ".tessera-declined") == [f"Sparse: 3 attention calls stayed dense, {HOSTILE}. Lower min_tokens."]
    assert texts(side, ".tessera-amount") == ["Sparse held1 MiB", "Peak of cuda:0at most 1 GiB"]
    side.query_selector(".tessera-show").click()  # its node is not on this canvas
    canvas.page.wait_for_selector(".p-toast-message")
    assert side.query_selector_all("img, script") == [] and canvas.page.evaluate("window.broken") is None

    for number in range(20):
        tell(canvas, "run", **told(f"b{number}", ["full"], ended="finished", seconds=2.0, features=[]))
    for strange in ({}, {"run": 7, "timeline": "none"}, {"run": "s", "timeline": {"from": 10**9, "columns": 3}}):
        tell(canvas, "step", **strange)
    canvas.page.wait_for_function("() => document.querySelectorAll('.tessera-sidebar option').length === 16")
    side.query_selector("select").select_option("b10")
    assert texts(side, ".tessera-section") == ["What actedNo Tessera node: this was a plain run."]
    tell(canvas, "run", **told("c", ["full"], ended="error", seconds=2.0, features=[]))
    canvas.page.wait_for_function("() => document.querySelector('.tessera-sidebar option').value === 'c'")
    assert side.query_selector("select").evaluate("e => e.value") == "b10"  # what was chosen stays


def test_a_plan_tells_of_others(canvas):
    """Its rows that are not ours, beside the runs of its workflow."""
    rows = [{"owner": "Other Pack", "name": "Wrapper", "does": "stands around the model", "state": "acts"},
            {"owner": "ComfyUI", "name": HOSTILE, "does": "skips", "state": "idle", "why": "no wrapper"},
            {"owner": "Tessera", "name": "Taylor Cache", "does": "forecasts", "state": "acts"}, 7]  # fmt: skip
    side = opened(canvas, None)
    node = canvas.call("record", None, {"kind": "plan", "rows": rows, "conflicts": ["Two caches.", {}]})
    canvas.queue()
    canvas.panel(node, "tessera_report")
    tell(canvas, "run", **told("p", ["full"], ended="finished", seconds=2.0, features=[]))
    canvas.page.wait_for_function(ENDED.format("finished"))
    shown = [
        "Two caches.",
        "Wrapper (Other Pack): stands around the model",
        f"{HOSTILE} (ComfyUI): skips (idle: no wrapper)",
    ]
    assert texts(side, ".tessera-section:last-child p") == shown


def test_trials_are_told_until_a_run_tells_for_itself(canvas):
    side = opened(canvas, None)
    tell(canvas, "trial", node="4", trial=2, of=12, name=HOSTILE, best="")
    canvas.page.wait_for_function("() => !document.querySelector('.tessera-told').hidden")
    assert texts(side, ".tessera-told") == [f"Trial 2 of at most 12: {HOSTILE}"]
    assert not side.query_selector(".tessera-empty").is_visible()
    stopped = {"prompt_id": "p", "node_id": "4", "node_type": "KSampler", "executed": []}
    canvas.page.evaluate("detail => app.api.dispatchCustomEvent('execution_interrupted', detail)", stopped)
    assert texts(side, ".tessera-told") == [f"Interrupted at trial 2 of at most 12: {HOSTILE}"]
    tell(canvas, "step", **told("t", ["full"]))
    canvas.page.wait_for_function("() => document.querySelector('.tessera-told').hidden")
