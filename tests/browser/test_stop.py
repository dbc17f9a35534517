"""The button of the Block Video Sampler, in both node renderers: a run that is stopped from the keyboard keeps its blocks."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

pytestmark = [pytest.mark.browser, pytest.mark.server]

ROOT = Path(__file__).resolve().parents[2]
SAMPLER, NOISE, SCHEDULE, SAVE = "6", "8", "7", "13"
FRAMES, BLOCK = 32, 4


@pytest.mark.parametrize("renderer", ["classic", "vue"])
def test_a_run_ends_after_its_block(canvas, server, renderer):
    canvas.look(renderer, "light" if renderer == "vue" else "dark")
    graph = json.loads((ROOT / "workflows" / "block_video_sampler.json").read_text("utf-8"))
    canvas.page.evaluate("async (w) => { await app.loadGraphData(w); }", graph)
    canvas.page.keyboard.press("Escape")
    set_value = "([id, name, value]) => { app.graph.getNodeById(id).widgets.find(w => w.name === name).value = value; }"
    canvas.page.evaluate(set_value, [NOISE, "noise_seed", 31 if renderer == "vue" else 32])
    canvas.page.evaluate(set_value, [SCHEDULE, "steps", 40])
    canvas.call("show", SAMPLER)
    button = canvas.panel(SAMPLER, "tessera_stop").query_selector("button")
    assert button.is_disabled() and button.inner_text() == "Stop after this block"
    canvas.queue()
    canvas.page.wait_for_function("b => !b.disabled", arg=button, timeout=120_000)
    canvas.shoot(f"stop-{renderer}")
    button.focus()
    canvas.page.keyboard.press("Enter")
    canvas.page.wait_for_function("b => b.disabled", arg=button)
    finished = "id => tesseraTest.panel(id, 'tessera_stop').textContent.includes('not running')"
    canvas.page.wait_for_function(finished, arg=SAMPLER, timeout=120_000)
    canvas.page.wait_for_function(
        "async () => !(await (await fetch('/queue')).json()).queue_running.length", timeout=60_000
    )
    entry = max(server.get("/history").values(), key=lambda found: found["prompt"][0])
    assert entry["status"]["status_str"] == "success"
    (file,) = entry["outputs"][SAVE]["images"]
    saved = server.get(f"/view?filename={file['filename']}&subfolder={file['subfolder']}&type=output")
    frames = Image.open(io.BytesIO(saved)).n_frames
    assert BLOCK <= frames < FRAMES and frames % BLOCK == 0
