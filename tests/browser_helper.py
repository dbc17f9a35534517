"""What the browser tests ask of panels, and records that they draw."""

import base64
import time

HOSTILE = "<img src=x onerror='window.broken = 1'><script>window.broken = 1</script>"
LEVELS = (0.2, 0.6, 0.85, 0.93, 0.97)  # one share for each colour of the map


def texts(panel, selector):
    return panel.evaluate("(e, s) => [...e.querySelectorAll(s)].map(x => x.textContent)", selector)


def newest_outputs(server):
    """Of the run queued last, once its last node is done: a panel shows before the history has the run."""
    while any(server.get("/queue").values()):
        time.sleep(0.05)
    return max(server.get("/history").values(), key=lambda entry: entry["prompt"][0])["outputs"]


def assert_inside_its_node(canvas, node, panel, renderer):
    """Nothing is cut off: the panel holds its content, and the node holds the panel."""
    canvas.page.wait_for_function("e => e.offsetHeight >= e.firstElementChild.offsetHeight", arg=panel)
    fits = """([id, vue]) => { const node = app.graph.getNodeById(id), e = tesseraTest.panel(id, 'tessera_report');
        if (!vue) return node.size[1] >= node.widgets.at(-1).y + e.offsetHeight;
        const outer = document.querySelector(`[data-node-id="${id}"]`).getBoundingClientRect();
        return outer.bottom >= e.getBoundingClientRect().bottom; }"""
    canvas.page.wait_for_function(fits, arg=[node, renderer == "vue"])


def mask_of(rows, columns, shades, caption="Step 1 of 2, block 0, head 0."):
    return {"rows": rows, "columns": columns, "cells": base64.b64encode(bytes(shades)).decode(), "caption": caption}


def probe_record(blocks=40, steps=(0, 8, 16, 24), pattern="blocks", setting="density"):
    def entry(value, recall):
        return {
            "value": value,
            "density": value if setting == "density" else value / 100,
            "amount": 9,
            "recall": recall,
        }

    by_block = [
        {"block": i, "recall": LEVELS[i % 5], "by_step": [LEVELS[(i + j) % 5] for j in range(len(steps))],
         "suggested": entry(0.1 + i / 100, 0.91)}
        for i in range(blocks)
    ]  # fmt: skip
    by_block[3]["by_step"][1], by_block[3]["suggested"] = None, None
    ladder = [entry(d, d**0.2) for d in (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)]
    lines = ["density 0.25 keeps 0.758 of the attention mass", "for 0.9 set density 0.6"]
    return {
        "kind": "probe", "pattern": pattern, "setting": setting, "block": 16, "grid": [1, 64, 64], "tokens": 4096,
        "others": 512, "queries": 128, "wanted": 0.9, "chosen": entry(0.25, 0.758), "suggested": entry(0.6, 0.9029),
        "ladder": ladder, "steps": list(steps), "sigmas": [1.0, 0.8, 0.5, 0.1], "blocks": by_block, "enough": "3,8",
        "seed": 0, "lines": lines, "notes": ["2 calls not measured: token layout unknown"],
    }  # fmt: skip
