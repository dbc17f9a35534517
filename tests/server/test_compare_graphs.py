"""scripts/compare.py as its reader would use it: a process of its own against a running server."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/compare.py"


def graph(path, interval):
    made = json.loads((ROOT / "workflows/api/digits_video.json").read_text())
    made = {k: n for k, n in made.items() if n["class_type"] not in ("TesseraCompare", "SaveImage")}
    for node in made.values():
        if node["class_type"] == "TesseraTaylorCache":
            node["inputs"].update(interval=interval, warmup=2)
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 8
    path.write_text(json.dumps(made))
    return str(path)


def run(*words):
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)


@pytest.mark.server
def test_three_graphs(server, tmp_path):
    paths = [graph(tmp_path / f"every{n}.json", n) for n in (1, 3)] + [graph(tmp_path / "again.json", 1)]
    done = run(*paths, "--repeats", "1", "--server", server.url, "--json", str(tmp_path / "r" / "report.json"),
               "--csv", str(tmp_path / "report.csv"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "r" / "report.json").read_text())["graphs"]
    assert [r["graph"] for r in rows] == ["every1", "every3", "again"]
    assert rows[0]["identical"] and rows[2]["identical"] and rows[2]["ssim"] == 1.0
    assert not rows[1]["identical"] and 0 < rows[1]["ssim"] < 1 and rows[1]["psnr"] > 5
    assert all(0 < r["sampling"] <= r["whole"] for r in rows) and rows[0]["speedup"] == 1.0
    (reported,) = rows[1]["reports"].values()
    assert reported[0]["features"][0]["facts"]["forecast"] > 0
    with (tmp_path / "report.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [t["graph"] for t in table] == ["every1", "every3", "again"] and table[1]["ssim"] == str(rows[1]["ssim"])
    assert done.stdout.splitlines()[1].startswith("every1") and "equal" in done.stdout


def test_what_cannot_be_compared(tmp_path):
    path = graph(tmp_path / "a.json", 2)
    assert "two graphs or more" in run(path).stderr
    assert "from 1 to 100" in run(path, path, "--repeats", "0").stderr
    assert "cannot be read" in run(path, str(tmp_path / "none.json")).stderr
    assert "No ComfyUI answers" in run(path, path, "--server", "http://127.0.0.1:1").stderr
