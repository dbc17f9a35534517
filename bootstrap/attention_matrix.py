"""Which attention node serves which model: `python bootstrap/attention_matrix.py` runs every node at its defaults, with
min_tokens 0 and a pattern that fits a small picture, on one tiny model of each family for three steps, and writes tests/golden/attention_matrix.json,
docs/attention_matrix.md and the table in README.md."""

import argparse
import functools
import inspect
import json
import re
from dataclasses import replace
from typing import Any

from pack import ROOT, load_pack, use_comfyui

use_comfyui()
load_pack()

from comfy_api.latest import io
from tiny_models import build_direct, sample, tiny
from tiny_specs import HUNYUAN_DIT, SPECS, Spec

from tessera import archs
from tessera.nodes import discover
from tessera.patching.report import latest_record

LOCK, PAGE, README = ROOT / "tests/golden/attention_matrix.json", ROOT / "docs/attention_matrix.md", ROOT / "README.md"
BEGIN, END = "<!-- attention matrix -->\n", "<!-- end of the attention matrix -->"
SMALL = {"radius": 4, "wt": 2, "wh": 4, "ww": 4, "block": 16, "ref_frames": 1, "topk": 0.1}  # patterns
SMALL |= {"global_every": 0, "depth": 1.0, "allow_untrained": True, "dense_first_steps": 0}  # every block and step
FRAMES, WIDER, LARGE = (
    6,
    (4, 2),
    32,
)  # of a clip at least; times the tiny picture's sides, so that no pattern spans it; sides that are long enough
MODELS = {**SPECS, "hunyuan_dit": HUNYUAN_DIT}
Cell = dict[str, Any]  # {"refused": sentence}, or {"served": calls, "declined": {reason: calls}}


def attention_nodes() -> list[type[io.ComfyNode]]:
    """The attention nodes that need nothing but a MODEL and take the shared inputs."""
    found = []
    for node in discover(strict=True):
        if node.GET_SCHEMA().category != "Tessera/attention":
            continue
        inputs = {i.id: i for i in node.GET_SCHEMA().inputs}
        needed = [
            i for i in inputs.values() if not i.optional and i.id != "model" and not isinstance(i, io.WidgetInput)
        ]
        if "min_tokens" in inputs and "model" in inputs and not needed:
            found.append(node)
    return sorted(found, key=lambda node: node.GET_SCHEMA().display_name)


def defaults(node: type[io.ComfyNode]) -> dict[str, Any]:
    """Values of the widgets that must be given."""
    given = {}
    for widget in node.GET_SCHEMA().inputs:
        if widget.id != "model" and not widget.optional:
            options = getattr(widget, "options", None)
            given[widget.id] = options[0] if widget.default is None and options else widget.default
    return given


@functools.cache
def model_of(name: str) -> Any:
    """A tiny model of that name, to be patched on a clone."""
    return build_direct(HUNYUAN_DIT) if name == "hunyuan_dit" else tiny(name)[0]


@functools.cache
def roomy(name: str) -> Spec:
    """The spec of that tiny model with the largest picture that it takes; what has no height and width stays."""
    spec = MODELS[name]
    parts = spec.latent if isinstance(spec.latent, list) else [spec.latent]
    first = parts[0]
    small = len(first) >= 4 and (min(first[-2:]) < LARGE or first[1] == 3)  # 3 channels are pixels, 16 a token
    for times in WIDER if small else ():
        frames = (max(first[2], FRAMES),) if len(first) == 5 else ()
        wider = (*first[:2], *frames, times * first[-2], times * first[-1])
        larger = replace(spec, latent=[wider, *parts[1:]] if isinstance(spec.latent, list) else wider)
        try:
            sample(model_of(name), larger, steps=1)
        except (AssertionError, RuntimeError, IndexError):  # its table of positions is smaller
            continue
        return larger
    return spec


def cell(node: type[io.ComfyNode], name: str) -> Cell:
    """What this node does on the tiny model of that name."""
    model = model_of(name)
    prepared = node.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: "1"}})
    try:
        given = defaults(node)
        kinds = {i.id: type(getattr(i, "default", None)) for i in node.GET_SCHEMA().inputs}
        given |= {name: value for name, value in SMALL.items() if kinds.get(name) is type(value)}
        given["min_tokens"] = 0
        made = prepared.EXECUTE_NORMALIZED(model=model, **given)
    except ValueError as sentence:
        return {"refused": str(sentence)}
    patched = made[0]
    sample(patched, roomy(name), steps=3)
    told = latest_record(patched)["features"][-1]["facts"]
    return {"served": told["served"], "declined": told["declined"]}


def families() -> dict[str, str]:
    """Tiny model: name of its family."""
    return {name: archs.find(model_of(name).model.diffusion_model).name for name in MODELS}


def word(value: Cell) -> str:
    """The cell in one word, or with its reason."""
    if "refused" in value:
        return "no: " + value["refused"]
    if not value["declined"]:
        return "yes"
    return ("part: " if value["served"] else "no: ") + "; ".join(value["declined"])


def tables(cells: dict[str, dict[str, Cell]], names: dict[str, str]) -> tuple[str, str]:
    """(page, table for the README) from {node: {tiny model: cell}}."""
    nodes = list(cells)
    page = [
        "# Which attention node serves which model\n",
        "Written by `make matrix`: each node at its defaults, on a tiny model of the family in ComfyUI's own loader. "
        "Only image self-attention counts.\n",
        f"| model | {' | '.join(nodes)} |",
        "|---" * (len(nodes) + 1) + "|",
    ]
    short: dict[str, list[str]] = {}
    for name, family in names.items():
        words = [word(cells[node][name]) for node in nodes]
        page.append(f"| {family} (`{name}`) | {' | '.join(words)} |")
        short.setdefault(family, [w.split(":")[0] for w in words])
    head = [f"| | {' | '.join(nodes)} |", "|---" * (len(nodes) + 1) + "|"]
    rows = [f"| {family} | {' | '.join(words)} |" for family, words in short.items()]
    return "\n".join(page) + "\n", "\n".join(head + rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=inspect.getdoc(inspect.getmodule(main)))
    parser.add_argument("--only", help="words in display names of nodes; the others keep what is written")
    args = parser.parse_args()
    cells: dict[str, dict[str, Cell]] = json.loads(LOCK.read_text()) if LOCK.is_file() else {}
    nodes = {node.GET_SCHEMA().display_name: node for node in attention_nodes()}
    for title, node in nodes.items():
        if title not in cells or not args.only or re.search(args.only, title, re.IGNORECASE):
            cells[title] = {name: cell(node, name) for name in MODELS}
            print(
                f"{title}: {sum('served' in c for c in cells[title].values())} of {len(MODELS)} tiny models", flush=True
            )
    cells = {title: cells[title] for title in nodes}
    LOCK.write_text(json.dumps(cells, indent=1) + "\n")
    page, table = tables(cells, families())
    PAGE.write_text(page)
    text = README.read_text()
    before, rest = text.split(BEGIN)
    README.write_text(before + BEGIN + table + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
