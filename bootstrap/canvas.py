"""Graphs in API form -> canvas form, the file that the frontend opens, laid out left to right; and what a canvas file
says, so that the two can be compared.

API form: {id: {class_type, inputs: {name: value or [id, output]}, _meta: {title, note, needs}}}; a note becomes a note
node above its node. needs: weights that the pack does not carry, [{name, url, directory}], which the frontend offers to
download. Canvas form: version 0.4, widget values by position."""

import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", "CURVE", "RANGE", "COMFY_DYNAMICCOMBO_V3"}
CONTROL = ("fixed", "increment", "decrement", "randomize")  # the value after a seed: what happens to it after a run
NOTE = "MarkdownNote"
COLUMN, ROW, WIDTH, LINE = 460, 60, 320, 24  # pixels: column and row distance, node width, one slot or widget
GROWTH = {  # pixels that a node grows by at most when a run draws into it, in the classic canvas or as a Vue node
    "TesseraCompare": 680, "TesseraRunReport": 500, "TesseraAttentionProbe": 460,
    "TesseraBlockVideoSampler": 130, "TesseraBlockLinearVideoSampler": 130,
    "TesseraProfileModel": 560, "TesseraPlan": 520,
    "SaveImage": 300, "SaveAnimatedWEBP": 300, "PreviewImage": 300,
}  # fmt: skip
LIVE_LINE = 60  # by which every other node of the pack grows, that of its live line


@dataclass
class Entry:
    """One input of a node as the canvas shows it."""

    name: str
    type: str
    options: dict[str, Any] = field(default_factory=dict)
    optional: bool = False

    @property
    def is_widget(self) -> bool:
        return self.type in WIDGETS and not self.options.get("forceInput")

    @property
    def default(self) -> Any:
        if "default" in self.options:
            return self.options["default"]
        if self.type == "COMFY_DYNAMICCOMBO_V3":
            return self.options["options"][0]["key"]
        if self.type == "COMBO" and self.options.get("options"):
            return self.options["options"][0]
        return {"STRING": "", "INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(self.type)


def is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def entries(inputs: dict[str, Any], given: dict[str, Any], prefix: str = "") -> list[Entry]:
    """The inputs of a node in the order of its schema (/object_info's "input"), conditional and growing ones as far as
    `given`, its inputs in API form, opens them."""
    out: list[Entry] = []
    for group in ("required", "optional"):
        for name, (kind, *rest) in inputs.get(group, {}).items():
            options = dict(rest[0]) if rest else {}
            if isinstance(kind, list):  # a choice in the older notation
                kind, options = "COMBO", {**options, "options": kind}
            entry = Entry(prefix + name, kind, options, group == "optional")
            if kind == "COMFY_AUTOGROW_V3":
                slot = next(iter(options["template"]["input"]["required"].values()))[0]
                out += [Entry(key, slot, optional=True) for key in given if key.startswith(entry.name + ".")]
                continue
            out.append(entry)
            if kind == "COMFY_DYNAMICCOMBO_V3":
                chosen = given.get(entry.name, entry.default)
                option = next((o for o in options["options"] if o["key"] == chosen), {})
                out += entries(option.get("inputs", {}), given, entry.name + ".")
    return out


def complete(graph: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """The graph with every widget named, absent ones with their defaults, in the order of the schemas.

    ValueError on a node or an input that `info` (/object_info) does not have."""
    out = {}
    for key, node in graph.items():
        if node["class_type"] not in info:
            raise ValueError(f"Node {key} is a {node['class_type']}, which this ComfyUI does not have.")
        given = node["inputs"]
        known = entries(info[node["class_type"]]["input"], given)
        unknown = sorted(given.keys() - {e.name for e in known})
        if unknown:
            raise ValueError(f"{node['class_type']} (node {key}) has no input {', '.join(unknown)}.")
        inputs = {e.name: given.get(e.name, e.default) for e in known if e.name in given or e.is_widget}
        out[key] = {**node, "inputs": inputs}
    return out


def _depths(graph: dict[str, Any]) -> dict[str, int]:
    """Column of every node: a source stands just left of its first reader, everything else as far left as it can."""
    sources = {key: [v[0] for v in node["inputs"].values() if is_link(v)] for key, node in graph.items()}
    left: dict[str, int] = {}

    def depth(key: str) -> int:
        if key not in left:
            left[key] = 1 + max((depth(s) for s in sources[key]), default=-1)
        return left[key]

    for key in graph:
        depth(key)
    for key in graph:
        readers = [left[reader] for reader, origin in sources.items() if key in origin]
        if not sources[key] and readers:
            left[key] = min(readers) - 1
    return left


def _text_height(text: str) -> int:
    return LINE * max(3, 2 + len(text) // 38)  # the canvas makes no note lower


def _note(number: int, text: str, position: list[int]) -> dict[str, Any]:
    return {
        "id": number, "type": NOTE, "pos": position, "size": [WIDTH, _text_height(text)], "flags": {}, "order": 0,
        "mode": 0, "inputs": [], "outputs": [], "title": "Note", "properties": {}, "widgets_values": [text],
        "color": "#432", "bgcolor": "#000",
    }  # fmt: skip


def _node(number: int, node: dict[str, Any], info: dict[str, Any], version: str) -> dict[str, Any]:
    """One node without its place and links."""
    known = entries(info["input"], node["inputs"])
    inputs: list[dict[str, Any]] = []
    for entry in sorted(known, key=lambda e: e.is_widget):
        shape = {"shape": 7} if entry.optional and not entry.is_widget else {}
        widget = {"widget": {"name": entry.name}} if entry.is_widget else {}
        inputs.append({"name": entry.name, "type": entry.type, **shape, **widget, "link": None})
    values: list[Any] = []
    for entry in known:
        if not entry.is_widget:
            continue
        value = node["inputs"].get(entry.name, entry.default)
        values.append(entry.default if is_link(value) else value)
        if entry.options.get("control_after_generate"):
            values.append("fixed")
        if entry.options.get("image_upload"):
            values.append("image")
    outputs = [
        {"name": name, "type": kind, "links": [], "slot_index": slot}
        for slot, (name, kind) in enumerate(zip(info["output_name"], info["output"], strict=True))
    ]
    ours = node["class_type"].startswith("Tessera")
    lines = len(known) + sum(e.options.get("multiline", False) * 3 for e in known) + len(outputs) * (not known)
    lines += sum(bool(e.options.get("control_after_generate")) for e in known)
    made = {
        "id": number, "type": node["class_type"], "pos": [0, 0], "size": [WIDTH, LINE * max(lines + 2, 4)], "flags": {},
        "order": 0, "mode": 0, "inputs": inputs, "outputs": outputs,
        "properties": {"cnr_id": "tessera" if ours else "comfy-core", "Node name for S&R": node["class_type"]},
        "widgets_values": values,
    }  # fmt: skip
    if ours:
        made["properties"]["ver"] = version
    if needs({"": node}):
        made["properties"]["models"] = needs({"": node})
    title = node.get("_meta", {}).get("title", info["display_name"])
    return made if title == info["display_name"] else {**made, "title": title}


def to_canvas(name: str, graph: dict[str, Any], info: dict[str, Any], version: str) -> dict[str, Any]:
    """The canvas file of a complete graph. Node ids stay; `version` is the pack's."""
    nodes = {key: _node(int(key), node, info[node["class_type"]], version) for key, node in graph.items()}
    links: list[list[Any]] = []
    for key, node in graph.items():
        for slot, entry in enumerate(nodes[key]["inputs"]):
            value = node["inputs"].get(entry["name"])
            if is_link(value):
                source = nodes[value[0]]["outputs"][value[1]]
                links.append([len(links) + 1, int(value[0]), value[1], int(key), slot, source["type"]])
                source["links"].append(len(links))
                entry["link"] = len(links)
    columns = _depths(graph)
    below: dict[int, int] = {}
    notes = []
    for order, key in enumerate(sorted(graph, key=lambda k: (columns[k], int(k)))):
        x, y = columns[key] * COLUMN, below.get(columns[key], 0)
        text = graph[key].get("_meta", {}).get("note")
        if text:  # above, where it stays beside a node that leaves much room below itself
            notes.append(_note(max(map(int, graph)) + 1 + len(notes), text, [x, y]))
            y += _text_height(text) + ROW
        nodes[key].update(pos=[x, y], order=order)
        below[columns[key]] = y + nodes[key]["size"][1] + ROW + growth(graph[key]["class_type"])
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"tessera/workflows/{name}")), "revision": 0,
        "last_node_id": max(map(int, graph)) + len(notes), "last_link_id": len(links),
        "nodes": [*nodes.values(), *notes], "links": links, "groups": [], "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


def growth(kind: str) -> int:
    """Pixels to leave below a node of this class."""
    return GROWTH.get(kind, LIVE_LINE if kind.startswith("Tessera") and not kind.startswith("TesseraDigits") else 0)


def widget_values(node: dict[str, Any]) -> dict[str, Any]:
    """The widgets of a canvas node by name. ValueError where there are more or fewer values than widgets."""
    values = list(node.get("widgets_values") or [])
    out = {}
    names = [i["widget"]["name"] for i in node["inputs"] if "widget" in i]
    for name in names:
        if not values:
            raise ValueError(f"{node['type']} (node {node['id']}) has no value for its widget {name}.")
        out[name] = values.pop(0)
        if values and values[0] in CONTROL and name.endswith("seed"):
            values.pop(0)
        if values == ["image"]:  # the upload button of Load Image
            values.pop(0)
    if values:
        raise ValueError(f"{node['type']} (node {node['id']}) has values without a widget: {values}.")
    return out


def to_api(canvas: dict[str, Any]) -> dict[str, Any]:
    """Node types, widget values and links of a canvas file, in API form without titles."""
    links = {link[0]: [str(link[1]), link[2]] for link in canvas["links"]}
    out = {}
    for node in canvas["nodes"]:
        if node["type"] in (NOTE, "Note"):
            continue
        inputs = widget_values(node)
        inputs |= {i["name"]: links[i["link"]] for i in node["inputs"] if i.get("link") is not None}
        out[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return out


def bare(graph: dict[str, Any]) -> dict[str, Any]:
    """A graph in API form without titles and notes, for comparison."""
    return {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in graph.items()}


def needs(graph: dict[str, Any]) -> list[dict[str, str]]:
    """The weights of a graph in API form that the pack does not carry."""
    return [weight for node in graph.values() for weight in node.get("_meta", {}).get("needs", [])]


def told(canvas: dict[str, Any]) -> list[dict[str, str]]:
    """The same of a canvas file."""
    return [weight for node in canvas["nodes"] for weight in node["properties"].get("models", [])]


def models(names: Iterable[str]) -> set[str]:
    """What a loader's choices and needed weights have in common: a file by its name, a model of many files by its
    folder."""
    return {name.partition("/")[0] for name in names}


def dump(data: Any) -> str:
    """JSON as these files hold it: indented, short lists on one line."""
    return _dump(data, 0) + "\n"


def _dump(data: Any, depth: int) -> str:
    flat = json.dumps(data, ensure_ascii=False)
    if not isinstance(data, (dict, list)) or len(flat) + 2 * depth <= 110:
        return flat
    pad, end = "  " * (depth + 1), "  " * depth
    if isinstance(data, dict):
        inner = [f"{json.dumps(k, ensure_ascii=False)}: {_dump(v, depth + 1)}" for k, v in data.items()]
        return "{\n" + ",\n".join(pad + row for row in inner) + f"\n{end}}}"
    return "[\n" + ",\n".join(pad + _dump(v, depth + 1) for v in data) + f"\n{end}]"
