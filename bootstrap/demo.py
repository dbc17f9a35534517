"""`make demo`: a real ComfyUI runs the showcase graphs, plain and accelerated, through its HTTP API. Pictures and reports
are saved in .host/demo/, and the comparison is printed."""

import copy
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from comfy_server import ComfyServer, GraphError, ServerError
from digits_read import Reader
from pack import ROOT
from PIL import Image, ImageSequence

OUT = ROOT / ".host" / "demo"
GRAPHS = {
    "digits_image": "text to image, 256 tokens",
    "digits_video": "text to video, 128 tokens",
    "digits_long_video": "video, 1,024 tokens",
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCELERATORS = ("TesseraTaylorCache", "TesseraLocalWindowAttention")


def load(name: str) -> dict:
    return json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text())


def node_of(graph: dict, kind: str) -> str:
    """The id of the graph's one node of this class."""
    return next(i for i, node in graph.items() if node["class_type"] == kind)


def plain(graph: dict) -> dict:
    """The same graph without accelerators, reports and comparison."""
    graph = copy.deepcopy(graph)
    loader = node_of(graph, "UNETLoader")
    drop = {i for i, n in graph.items() if n["class_type"] in (*ACCELERATORS, "TesseraRunReport", "TesseraCompare")}
    sampler = node_of(graph, "KSampler")
    drop |= {i for i, n in graph.items() if any(isinstance(v, list) and v[0] in drop and i not in drop and
             n["class_type"] == "SaveImage" and graph[v[0]]["class_type"] == "TesseraCompare" for v in n["inputs"].values())}  # fmt: skip
    for i in drop:
        del graph[i]
    for node in graph.values():
        for key, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in drop:
                node["inputs"][key] = [loader, 0] if key == "model" else [sampler, 0]
    return graph


def without_compare(graph: dict) -> dict:
    """The accelerated graph alone."""
    compare = node_of(graph, "TesseraCompare")
    uses = {i for i, n in graph.items() if any(isinstance(v, list) and v[0] == compare for v in n["inputs"].values())}
    return {i: n for i, n in graph.items() if i != compare and i not in uses}


def pixels(files: list[Path]) -> torch.Tensor:
    """Grey frames [N, H, W] in 0..1 of the saved pictures, in order."""
    frames = []
    for file in files:
        with Image.open(file) as opened:
            frames += [np.array(f.convert("L"), dtype=np.float32) / 255 for f in ImageSequence.Iterator(opened)]
    return torch.from_numpy(np.stack(frames))


def read_right(reader: Reader, graph: dict, frames: torch.Tensor) -> str:
    """What the classifier reads in the result, against what the prompt asked for."""
    asked = next(n["inputs"]["text"] for n in graph.values() if n["class_type"] == "TesseraDigitsPrompt")
    words = asked.split()
    if len(words) == 1:
        labels = [DIGITS[int(i)] for i in reader.read_images(frames)]
        return f"{sum(label == words[0] for label in labels)} of {len(labels)} read as {words[0]}"
    labels, directions = reader.read_clips(frames[None])
    return f"read as {DIGITS[int(labels[0])]} moving {directions[0]}"


def show(server: ComfyServer, reader: Reader, name: str, title: str) -> None:
    """Runs one showcase graph plain, accelerated and compared; prints and saves what came out."""
    graph = load(name)
    lines = []
    print(f"\n{name}: {title}", flush=True)
    for side, variant in (("plain", plain(graph)), ("accelerated", without_compare(graph))):
        print(f"  running {side}…", flush=True)
        files = server.outputs(server.run(variant))
        for file in files:
            shutil.copy(file, OUT / f"{name}_{side}_{file.stem.rsplit('_', 2)[-2]}{file.suffix}")
        lines.append(f"  {side:12s} {read_right(reader, graph, pixels(files))}")
    print("  running both in turn, to compare them…", flush=True)
    entry = server.run(graph)
    report = entry["outputs"][node_of(graph, "TesseraCompare")]["tessera_report"][0]
    compare_files = [f for f in server.outputs(entry) if "compare" in f.name]
    if compare_files:
        shutil.copy(compare_files[0], OUT / f"{name}_compare.png")
    (OUT / f"{name}.json").write_text(json.dumps(report, indent=2))
    a, b = report["a"], report["b"]
    print("\n".join(lines))
    print(
        f"  seconds      {a['seconds']['median']:.2f} plain, {b['seconds']['median']:.2f} accelerated (medians of {report['repeats']})"
    )
    print(f"  speed-up     {report['speedup']:.2f}x")
    print(
        f"  blocks       {b['blocks_computed']} of {b['blocks_total'] if not b['blocks_skipped'] else b['blocks_computed'] + b['blocks_skipped']} computed"
    )
    if b["pairs_fraction"] < 1:
        print(f"  attention    {b['pairs_fraction']:.1%} of the query-key pairs of the served calls")
    print(f"  SSIM {report['ssim']:.4f}, PSNR {report['psnr']} dB, latent error {report['latent_error']:.4f}")


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)  # nothing of an earlier run among the results of this one
    OUT.mkdir(parents=True)
    start = time.time()
    print("Starting ComfyUI with Tessera…", flush=True)
    try:
        reader = Reader()
        with ComfyServer() as server:
            print(f"ComfyUI answers at {server.url} after {time.time() - start:.0f} s.", flush=True)
            for name, title in GRAPHS.items():
                show(server, reader, name, title)
    except (GraphError, ServerError) as error:
        sys.exit(f"make demo failed: {error}")
    print(f"\nPictures and reports: {OUT.relative_to(ROOT)}/   ({time.time() - start:.0f} s)")


if __name__ == "__main__":
    main()
