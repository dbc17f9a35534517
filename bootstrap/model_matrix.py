"""Which cache serves which model: `python bootstrap/model_matrix.py` runs every cache, and what stretches positions, on one tiny
model of each family, with settings that must change a run of eight steps, and looks whether they do. Writes
tests/golden/model_matrix.json, docs/model_matrix.md and the table in README.md."""

import argparse
import functools
import inspect
import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import attention_matrix as matrix
import torch
from comfy_api.latest import io
from tiny_models import load, sample, write_checkpoint

from tessera.nodes import discover

ROOT = matrix.ROOT
LOCK, PAGE = ROOT / "tests/golden/model_matrix.json", ROOT / "docs/model_matrix.md"
BEGIN, END = "<!-- model matrix -->\n", "<!-- end of the model matrix -->"
CATEGORY, BESIDE = "Tessera/cache", ("Resonance YaRN RoPE",)
STEPS = 8
DEEPER = {"pixart": {"depth": 2}}  # caches that compute the first block need a second one
LIVELY = {"interval": 2, "threshold": 2.0, "start_step": 1, "round_to": 1, "refresh_every": 2, "start_percent": 0.0,
          "end_percent": 1.0, "base_h_tokens": 2, "base_w_tokens": 2}  # fmt: skip
Cell = dict[str, Any]  # {"refused": sentence} or {"acts": bool}


def nodes() -> dict[str, type[io.ComfyNode]]:
    """By display name: caches that need a MODEL alone, and what stretches its positions."""
    found = {}
    for node in discover(strict=True):
        schema = node.GET_SCHEMA()
        sockets = [i.id for i in schema.inputs if not i.optional and not isinstance(i, io.WidgetInput)]
        mine = schema.category == CATEGORY or schema.display_name in BESIDE
        if mine and sockets == ["model"] and isinstance(schema.outputs[0], io.Model.Output):
            found[schema.display_name] = node
    return dict(sorted(found.items()))


@functools.cache
def model_of(name: str) -> Any:
    """A tiny model of that name, to be patched on a clone."""
    if name not in DEEPER:
        return matrix.model_of(name)
    spec = matrix.MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.safetensors"
        write_checkpoint(replace(spec, arguments={**spec.arguments, **DEEPER[name]}), path)
        return load(path)


def patched(node: type[io.ComfyNode], name: str) -> Any:
    """The tiny model behind that node."""
    given = matrix.defaults(node)
    given |= {key: value for key, value in LIVELY.items() if key in given}
    prepared = node.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: "1"}})
    return prepared.EXECUTE_NORMALIZED(model=model_of(name), **given)[0]


def parts(latent: Any) -> list[torch.Tensor]:
    """Of picture and sound, where there are two."""
    return list(latent.unbind()) if getattr(latent, "is_nested", False) else [latent]


@functools.cache
def plain(name: str) -> list[torch.Tensor]:
    """What the tiny model samples without a node."""
    return parts(sample(model_of(name), matrix.MODELS[name], steps=STEPS))


def cell(node: type[io.ComfyNode], name: str) -> Cell:
    """What this node does on the tiny model of that name."""
    try:
        drawn = parts(sample(patched(node, name), matrix.MODELS[name], steps=STEPS))
    except ValueError as sentence:
        return {"refused": " ".join(str(sentence).split())}
    return {"acts": any(not torch.equal(a, b) for a, b in zip(drawn, plain(name), strict=True))}


def word(value: Cell) -> str:
    """The cell in one word, or with its reason."""
    return f"no: {value['refused']}" if "refused" in value else "yes" if value["acts"] else "no: nothing to do"


def tables(cells: dict[str, dict[str, Cell]], families: dict[str, str]) -> tuple[str, str]:
    """(page, table for the README) from {node: {tiny model: cell}}."""
    titles = list(cells)
    head = f"| {{}} | {' | '.join(titles)} |\n" + "|---" * (len(titles) + 1) + "|\n"
    page, short = [], {}
    for name, family in families.items():
        words = [word(cells[title][name]) for title in titles]
        page.append(f"| {family} (`{name}`) | {' | '.join(words)} |\n")
        short.setdefault(family, [w.split(":")[0] for w in words])
    told = (
        "# Which cache serves which model\n\nWritten by `make matrix`: each node on a "
        f"tiny model of the family in ComfyUI's own loader, {STEPS} steps, with settings at which it must change the picture "
        "(yes: it does). Attention nodes: `attention_matrix.md`.\n\n"
    )
    rows = "".join(f"| {family} | {' | '.join(words)} |\n" for family, words in short.items())
    return told + head.format("model") + "".join(page), head.format("") + rows


def main() -> None:
    parser = argparse.ArgumentParser(description=inspect.getdoc(inspect.getmodule(main)))
    parser.add_argument("--only", help="words in display names of nodes; the others keep what is written")
    args = parser.parse_args()
    cells: dict[str, dict[str, Cell]] = json.loads(LOCK.read_text()) if LOCK.is_file() else {}
    found = nodes()
    for title, node in found.items():
        if title not in cells or not args.only or re.search(args.only, title, re.IGNORECASE):
            cells[title] = {name: cell(node, name) for name in matrix.MODELS}
            print(
                f"{title}: {sum(c.get('acts', False) for c in cells[title].values())} of {len(matrix.MODELS)}",
                flush=True,
            )
    cells = {title: cells[title] for title in found}
    LOCK.write_text(json.dumps(cells, indent=1) + "\n")
    page, table = tables(cells, matrix.families())
    PAGE.write_text(page)
    before, rest = matrix.README.read_text().split(BEGIN)
    matrix.README.write_text(before + BEGIN + table + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
