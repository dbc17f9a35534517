"""Runs a graph on a ComfyUI server: python scripts/run_graph.py workflows/api/digits_image.json --set Prompt.text=five

Needs Python 3.10 and the package websocket-client. A node is named by its id, its title or its class; a value is JSON
where it can be (7, 2.5, true), else text. Saves the pictures in the subfolders that the graph names, prints every
Tessera report."""

import argparse
import json
import sys
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path, PurePosixPath

try:
    import websocket
except ImportError:
    raise SystemExit("run_graph.py needs a package: pip install websocket-client") from None

EXPORT = "Export the graph in ComfyUI with Workflow > Export (API) and give that file."


def load(path):
    """The graph in an API file; ValueError with the remedy where it is something else."""
    try:
        graph = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is not JSON ({error}). {EXPORT}") from None
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        raise ValueError(f"{path} is a workflow in canvas form. {EXPORT}")
    nodes = graph.values() if isinstance(graph, dict) else []
    if not nodes or not all(
        isinstance(n, dict) and "class_type" in n and isinstance(n.get("inputs"), dict) for n in nodes
    ):
        raise ValueError(f"{path} is not a graph in API form. {EXPORT}")
    return graph


def address(text):
    """The server's URL without a slash at its end, with http:// where no scheme is given."""
    url = (text if "://" in text else f"http://{text}").rstrip("/")
    try:
        parts = urllib.parse.urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        sound = False
    if not sound:
        raise ValueError(f"--server takes an address like http://127.0.0.1:8188, got {text!r}.")
    return url


def title_of(node):
    meta = node.get("_meta")
    return meta.get("title") if isinstance(meta, dict) else None


def find(graph, name):
    """The id of the node with this id, title or class; ValueError unless there is exactly one."""
    if name in graph:
        return name
    found = [key for key, node in graph.items()
             if name in (title_of(node), node["class_type"])]  # fmt: skip
    if len(found) != 1:
        raise ValueError(f"{len(found)} nodes are called {name!r}; use an id: {', '.join(graph)}.")
    return found[0]


def change(graph, setting):
    """Applies one NODE.INPUT=VALUE. ValueError where the graph has no such input."""
    target, equals, text = setting.partition("=")
    node, _, name = target.partition(".")
    if not equals or not name:
        raise ValueError(f"--set takes NODE.INPUT=VALUE, got {setting!r}.")
    inputs = graph[find(graph, node)]["inputs"]
    if name not in inputs:
        raise ValueError(f"{node} has no input {name!r}; it has {', '.join(inputs)}.")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    inputs[name] = text if isinstance(inputs[name], str) else value


def ask(server, path, data=None):
    """GET, or POST of JSON; the raw answer. SystemExit with the server's own sentences where it refuses."""
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(server + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        try:
            refused = json.loads(text)
        except json.JSONDecodeError:
            refused = None
        if not isinstance(refused, dict) or "error" not in refused:
            raise SystemExit(f"{server}{path} answered {error.code}: {text[:500]}") from None
        raise SystemExit(refusal(refused)) from None
    except OSError as error:
        raise SystemExit(no_answer(server, getattr(error, "reason", error))) from None


def no_answer(server, reason):
    return f"No ComfyUI answers at {server} ({reason}). Start one, or give --server."


def refusal(answer):
    """What the server's answer to /prompt says against the graph, a line for each input that is wrong."""
    error = answer.get("error") or "The graph was refused"
    if isinstance(error, dict):
        error = ": ".join(filter(None, (error.get("message"), error.get("details"))))
    lines = [f"{node['class_type']} ({key}): {e['message']}: {e['details']}"
             for key, node in (answer.get("node_errors") or {}).items() for e in node["errors"]]  # fmt: skip
    return "\n".join([error, *lines])


def queue(server, graph, client):
    """Queues the graph; its id. SystemExit where any part is wrong: the server would run the rest without a word."""
    answer = json.loads(ask(server, "/prompt", {"prompt": graph, "client_id": client}))
    if answer.get("node_errors"):
        ask(server, "/queue", {"delete": [answer["prompt_id"]]})
        ask(server, "/interrupt", {"prompt_id": answer["prompt_id"]})
        raise SystemExit(refusal(answer))
    return answer["prompt_id"]


def name_of(graph, key):
    """The class of a node; of one that another expanded into ("5.0.0.3"), the class of that other."""
    node = graph.get(key) or graph.get(key.split(".")[0])
    return node["class_type"] if node else f"node {key}"


def run(server, graph):
    """Queues the graph, follows it and returns its entry in the history."""
    client = uuid.uuid4().hex
    channel = websocket.WebSocket()
    try:
        channel.connect(f"{server.replace('http', 'ws', 1)}/ws?clientId={client}")
    except (OSError, websocket.WebSocketException) as error:
        raise SystemExit(no_answer(server, error)) from None
    prompt_id = queue(server, graph, client)
    while True:
        try:
            message = channel.recv()
        except (OSError, websocket.WebSocketException) as error:
            raise SystemExit(f"\nComfyUI at {server} ended or hung up during the run ({error}).") from None
        event = json.loads(message) if isinstance(message, str) and message else {"type": "preview", "data": {}}
        kind, data = event["type"], event["data"]
        if data.get("prompt_id", prompt_id) != prompt_id:
            continue
        if kind == "progress":
            print(f"\r{name_of(graph, data['node'])}: {data['value']} of {data['max']}", end="", file=sys.stderr)
        if kind == "execution_error":
            raise SystemExit(f"\n{data['node_type']} ({data['node_id']}): {data['exception_message'].strip()}")
        if kind == "execution_interrupted":
            raise SystemExit("\nThe run was interrupted.")
        if kind == "executing" and data["node"] is None:
            print(file=sys.stderr)
            channel.close()
            return json.loads(ask(server, f"/history/{prompt_id}"))[prompt_id]


def place_of(item, folder, taken):
    """Where a picture goes: its subfolder on the server under `folder`, and a name that this run has not `taken`."""
    within = [
        part for part in PurePosixPath(item.get("subfolder", "").replace("\\", "/")).parts if part not in ("..", "/")
    ]
    name = Path(item["filename"]).name
    place, count = folder.joinpath(*within, name), 1
    while place in taken:
        count += 1
        place = folder.joinpath(*within, f"{Path(name).stem}({count}){Path(name).suffix}")
    taken.add(place)
    return place


def save(server, outputs, folder):
    """Saves every picture of a run under `folder` and prints where."""
    taken = set()
    for item in [item for output in outputs.values() for item in output.get("images", [])]:
        place = place_of(item, folder, taken)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(ask(server, "/view?" + urllib.parse.urlencode(item)))
        print(place)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path, help="a graph in API form")
    parser.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="may be repeated")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for pictures, default here")
    parser.add_argument("--report", type=Path, help="also write the reports to this JSON file")
    parser.add_argument("--server", default="http://127.0.0.1:8188")
    args = parser.parse_args()
    try:
        server, graph = address(args.server), load(args.graph)
        for setting in args.set:
            change(graph, setting)
        for folder in [args.out, *([args.report.parent] if args.report else [])]:
            folder.mkdir(parents=True, exist_ok=True)
        if args.report and args.report.is_dir():
            raise ValueError(f"--report takes a file, and {args.report} is a folder.")
    except ValueError as error:
        raise SystemExit(str(error)) from None
    except OSError as error:
        raise SystemExit(
            f"{error.filename} cannot be made a folder: {error.strerror}. Give another --out or --report."
        ) from None
    outputs = run(server, graph)["outputs"]
    save(server, outputs, args.out)
    reports = {key: output["tessera_report"] for key, output in outputs.items() if "tessera_report" in output}
    if reports:
        print(json.dumps(reports, indent=2))
    if args.report:
        args.report.write_text(json.dumps(reports, indent=2))


if __name__ == "__main__":
    main()
