"""Everything about nodes that is made and not written: `python bootstrap/node_assets.py [WORKFLOW ...]`.

From a real ComfyUI and workflows/api/NAME.json: workflows/NAME.json for the canvas (kept where one with the same nodes,
links and values is there), workflows/NAME.jpg, tests/golden/schemas.json and docs/catalogue.md. With names, only these
workflows are run; of a workflow, only what its first picture needs. One that needs weights which the pack does not carry
is drawn instead."""

import argparse
import json
from pathlib import Path
from typing import Any

import tomllib
from canvas import bare, complete, dump, is_link, needs, to_api, to_canvas, told
from comfy_server import ComfyServer
from graph_picture import draw
from pack import ROOT
from schema_lock import broken, slice_of
from thumbnail import QUALITY, save_thumbnail

TIME = 3600  # s for one template: some train
WORKFLOWS, SCHEMAS, CATALOGUE = ROOT / "workflows", ROOT / "tests/golden/schemas.json", ROOT / "docs/catalogue.md"


def make_canvas(path: Path, info: dict[str, Any], version: str) -> dict[str, Any]:
    """Completes an API file, renews the canvas file beside it where the two differ, and returns the graph."""
    graph = complete(json.loads(path.read_text()), info)
    path.write_text(dump(graph))
    target = WORKFLOWS / path.name
    there = json.loads(target.read_text()) if target.is_file() else None
    if there is None or to_api(there) != bare(graph) or told(there) != needs(graph):
        target.write_text(dump(to_canvas(path.stem, graph, info, version)))
        print(f"{path.stem}: new canvas file")
    return graph


def towards_picture(graph: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """The part of a graph that its first picture needs; the whole graph where no output node takes pictures."""
    ends = [k for k, n in graph.items() if info[n["class_type"]]["output_node"] and is_link(n["inputs"].get("images"))]
    if not ends:
        return graph
    needed, open_ends = set(), {min(ends, key=int)}
    while open_ends:
        key = open_ends.pop()
        needed.add(key)
        open_ends |= {v[0] for v in graph[key]["inputs"].values() if is_link(v)} - needed
    return {key: node for key, node in graph.items() if key in needed}


def lock_schemas(ours: dict[str, Any], accept: bool) -> None:
    """Rewrites the schema lock. SystemExit where saved graphs would break and `accept` is not set."""
    current = {name: slice_of(ours[name]) for name in sorted(ours)}
    if SCHEMAS.is_file() and not accept:
        problems = broken(json.loads(SCHEMAS.read_text()), current)
        if problems:
            raise SystemExit(
                "\n".join(["These changes break saved graphs (--accept locks them all the same):", *problems])
            )
    SCHEMAS.parent.mkdir(parents=True, exist_ok=True)
    SCHEMAS.write_text(dump(current))


def catalogue(ours: dict[str, Any]) -> str:
    """The table of all nodes, one part for each folder."""
    parts = [
        "# Nodes\n\nWritten by `make node-assets` from the nodes themselves; every node has a help page in the canvas.\n"
    ]
    for category in sorted({node["category"] for node in ours.values()}):
        members = sorted((n for n in ours.values() if n["category"] == category), key=lambda n: n["display_name"])
        rows = [
            f"| {n['display_name']} | `{n['name']}` | {n['description']} | {', '.join(n['search_aliases'])} |"
            for n in members
        ]
        head = f"\n## {category}\n\n| node | id | what it does | also found as |\n|---|---|---|---|\n"
        parts.append(head + "\n".join(rows) + "\n")
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", nargs="*", help="run only these, by name; default all")
    parser.add_argument("--no-run", action="store_true", help="leave the thumbnails as they are")
    parser.add_argument("--accept", action="store_true", help="lock schemas that break saved graphs")
    args = parser.parse_args()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    with ComfyServer() as server:
        info = server.get("/object_info")
        ours = {name: node for name, node in info.items() if name.startswith("Tessera")}
        lock_schemas(ours, args.accept)
        CATALOGUE.write_text(catalogue(ours))
        for path in sorted((WORKFLOWS / "api").glob("*.json")):
            graph = make_canvas(path, info, version)
            if args.no_run or path.stem not in (args.workflow or [path.stem]):
                continue
            if needs(graph):
                canvas = json.loads((WORKFLOWS / path.name).read_text())
                draw(canvas, info).save(WORKFLOWS / f"{path.stem}.jpg", quality=QUALITY)
                print(f"{path.stem}: drawn")
            else:
                entry = server.run(towards_picture(graph, info), timeout=TIME)
                save_thumbnail(server.outputs(entry), WORKFLOWS / f"{path.stem}.jpg")
                print(f"{path.stem}: ran, thumbnail saved")
    print(f"{len(ours)} nodes in {CATALOGUE.relative_to(ROOT)} and {SCHEMAS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
