"""Runs two or more graphs on a ComfyUI server in alternation, and tells what the others gain and lose against the first:

    python scripts/compare.py graph_a.json graph_b.json [--repeats 3] [--json report.json] [--csv report.csv]

Every run begins with an empty cache of outputs. `sampling` is the time of the nodes that show progress, `whole` that of
the graph with its loaders; pictures are compared in the order in which the graphs save them. Needs torch, numpy, pillow
and websocket-client, as ComfyUI's own Python has them."""

import argparse
import csv
import importlib.util
import io
import json
import sys
import time
import urllib.parse
import uuid
from pathlib import Path
from statistics import median

import run_graph
from run_graph import address, ask, change, load, queue

ROOT = Path(__file__).resolve().parents[1]
ATTEMPTS = 4  # at a run that the server answers from its cache
COLUMNS = ("graph", "sampling", "whole", "speedup", "ssim", "psnr", "identical", "front")


def module(path):
    """A module of the pack that needs nothing but torch."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


class Watch:
    """Times the nodes of one run from the server's messages."""

    def __init__(self):
        self.spent, self.progressed, self.cached = {}, set(), []
        self.node, self.since, self.start, self.end = None, 0.0, None, None

    def see(self, kind, data):
        now = time.perf_counter()
        if kind == "execution_start":
            self.start = now
        if kind == "execution_cached":
            self.cached = data.get("nodes", [])
        if kind == "progress" and data.get("max", 1) > 1:
            self.progressed.add(data["node"])
        if kind == "executing":
            if self.node is not None:
                self.spent[self.node] = self.spent.get(self.node, 0.0) + now - self.since
            self.node, self.since = data["node"], now
            self.end = now if data["node"] is None else self.end

    @property
    def sampling(self):
        """Seconds of the nodes that showed progress; of all, where none did."""
        return sum(self.spent[n] for n in self.progressed if n in self.spent) or self.whole

    @property
    def whole(self):
        return self.end - self.start


def timed(server, graph):
    """(Watch, entry in the history) of one run in which nothing came from the cache."""
    for attempt in range(ATTEMPTS):
        ask(server, "/free", {"free_memory": True})
        time.sleep(0.3 * (attempt + 1))  # the server empties its cache between prompts
        watch, entry = watched(server, graph)
        if not watch.cached:
            return watch, entry
    raise SystemExit("The server keeps answering from its cache; start it with --cache-classic or --cache-none.")


def watched(server, graph):
    client = uuid.uuid4().hex
    channel = run_graph.websocket.WebSocket()
    try:
        channel.connect(f"{server.replace('http', 'ws', 1)}/ws?clientId={client}")
    except (OSError, run_graph.websocket.WebSocketException) as error:
        raise SystemExit(run_graph.no_answer(server, error)) from None
    watch, prompt_id = Watch(), None
    try:
        prompt_id = queue(server, graph, client)
        while watch.end is None:
            message = channel.recv()
            event = json.loads(message) if isinstance(message, str) and message else {"type": "preview", "data": {}}
            kind, data = event["type"], event["data"]
            if data.get("prompt_id", prompt_id) != prompt_id:
                continue
            if kind == "execution_error":
                raise SystemExit(f"{data['node_type']} ({data['node_id']}): {data['exception_message'].strip()}")
            if kind == "execution_interrupted":
                raise SystemExit("The run was interrupted.")
            watch.see(kind, data)
    except (OSError, run_graph.websocket.WebSocketException) as error:
        raise SystemExit(f"ComfyUI at {server} ended or hung up during the run ({error}).") from None
    except KeyboardInterrupt:
        ask(server, "/interrupt", {"prompt_id": prompt_id})
        raise SystemExit("Interrupted.") from None
    finally:
        channel.close()
    return watch, json.loads(ask(server, f"/history/{prompt_id}"))[prompt_id]


def pictures(server, entry):
    """Frames [N, H, W, 3] in 0..1 of every file that the run saved, in the order of its nodes."""
    import numpy as np
    import torch
    from PIL import Image, ImageSequence

    found = []
    for key in sorted(entry["outputs"], key=str):
        for item in entry["outputs"][key].get("images", []):
            with Image.open(io.BytesIO(ask(server, "/view?" + urllib.parse.urlencode(item)))) as opened:
                frames = [np.asarray(f.convert("RGB"), np.float32) / 255 for f in ImageSequence.Iterator(opened)]
            found.append(torch.from_numpy(np.stack(frames)))
    return found


def judged(quality, first, other):
    """(SSIM, PSNR, identical) over all pictures; None where the graphs save other sizes."""
    if not first or [p.shape for p in first] != [p.shape for p in other]:
        return None, None, None
    pairs = list(zip(first, other, strict=True))
    ssim = sum(quality.ssim(a, b) for a, b in pairs) / len(pairs)
    psnr = min(quality.psnr(a, b) for a, b in pairs)
    return ssim, psnr, all(bool((a == b).all()) for a, b in pairs)


def compared(server, graphs, names, repeats):
    """The report, one entry a graph."""
    quality, search = module("methods/measure/quality.py"), module("methods/measure/stack_search.py")
    watches, saved, reports = [[] for _ in graphs], [None] * len(graphs), [None] * len(graphs)
    for _ in range(repeats + 1):  # the first one warms up
        for n, graph in enumerate(graphs):
            watch, entry = timed(server, graph)
            watches[n].append(watch)
            print(f"\r{names[n]}: {watch.sampling:.2f} s   ", end="", file=sys.stderr)
            if saved[n] is None:
                saved[n] = pictures(server, entry)
                reports[n] = {k: o["tessera_report"] for k, o in entry["outputs"].items() if "tessera_report" in o}
    print(file=sys.stderr)
    rows, base = [], median(w.sampling for w in watches[0][1:])
    for n, name in enumerate(names):
        sampling, whole = (median(getattr(w, what) for w in watches[n][1:]) for what in ("sampling", "whole"))
        ssim, psnr, identical = judged(quality, saved[0], saved[n])
        rows.append({"graph": name, "sampling": round(sampling, 4), "whole": round(whole, 4),
                     "speedup": round(base / sampling, 4), "ssim": ssim if ssim is None else round(ssim, 6),
                     "psnr": None if psnr is None or psnr == float("inf") else round(psnr, 3), "identical": identical,
                     "reports": reports[n]})  # fmt: skip
    told = [search.Tried(search.Stack({r["graph"]: {"name": r["graph"]}}), r["speedup"], 1 - r["ssim"])
            for r in rows if r["ssim"] is not None]  # fmt: skip
    leading = {t.stack.name for t in search.front(told)}
    for row in rows:
        row["front"] = row["graph"] in leading if row["ssim"] is not None else None
    return {"kind": "compare graphs", "repeats": repeats, "graphs": rows}


def table(report):
    """The lines of a table for people."""
    lines = [f"{'graph':28s} {'sampling':>10s} {'whole':>10s} {'faster':>8s} {'SSIM':>8s} {'PSNR':>9s}"]
    for row in report["graphs"]:
        ssim = "-" if row["ssim"] is None else f"{row['ssim']:.4f}"
        psnr = "equal" if row["identical"] else "-" if row["psnr"] is None else f"{row['psnr']:.2f} dB"
        mark = " *" if row["front"] else ""
        lines.append(f"{row['graph'][:28]:28s} {row['sampling']:8.2f} s {row['whole']:8.2f} s {row['speedup']:7.2f}x "
                     f"{ssim:>8s} {psnr:>9s}{mark}")  # fmt: skip
    if any(row["front"] for row in report["graphs"]):
        lines.append("* none of the others is both faster and nearer to the first")
    return lines


def write(report, as_json, as_csv):
    if as_json:
        as_json.parent.mkdir(parents=True, exist_ok=True)
        as_json.write_text(json.dumps(report, indent=2))
    if as_csv:
        as_csv.parent.mkdir(parents=True, exist_ok=True)
        with as_csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(report["graphs"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graphs", type=Path, nargs="+", help="graphs in API form; the first one is the reference")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each, after one that warms up")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="in every graph; may be repeated"
    )
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    parser.add_argument("--server", default="http://127.0.0.1:8188")
    args = parser.parse_args()
    try:
        if len(args.graphs) < 2:
            raise ValueError("Give two graphs or more: the first is what the others are compared with.")
        if not 1 <= args.repeats <= 100:
            raise ValueError(f"--repeats goes from 1 to 100, got {args.repeats}.")
        server, graphs = address(args.server), [load(path) for path in args.graphs]
        for graph in graphs:
            for setting in args.set:
                change(graph, setting)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    stems = [path.stem for path in args.graphs]
    names = stems if len({*stems}) == len(stems) else [str(path) for path in args.graphs]
    names = [name if names.count(name) == 1 else f"{name} ({n + 1})" for n, name in enumerate(names)]
    report = compared(server, graphs, names, args.repeats)
    print("\n".join(table(report)))
    write(report, args.json, args.csv)


if __name__ == "__main__":
    main()
