"""scripts/run_graph.py as its reader would use it: a process of its own against a running server."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, GRAPH = ROOT / "scripts/run_graph.py", ROOT / "workflows/api/digits_image.json"

spec = importlib.util.spec_from_file_location("run_graph", SCRIPT)
run_graph = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_graph)


def run(server, folder, *words, graph=GRAPH):
    command = [sys.executable, str(SCRIPT), str(graph), "--out", str(folder), *words]
    if server is not None:
        command += ["--server", server.url]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.server
def test_runs_with_changed_inputs_and_saves_the_pictures(server, tmp_path):
    done = run(server, tmp_path, "--set", "Prompt.text=5", "--set", "KSampler.steps=3", "--set", "Compare.repeats=1",
               "--set", "EmptySD3LatentImage.batch_size=2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = [Path(line) for line in done.stdout.splitlines() if line.endswith(".png")]
    sizes = []
    for name in names:
        with Image.open(name) as picture:
            sizes.append(picture.size)
    assert "KSampler: 3 of 3" in done.stderr
    assert (
        sorted(sizes) == [(128, 128)] * 2 + [(3 * 128, 128)] * 2
    )  # the pictures, and Compare's pairs with differences


@pytest.mark.server
def test_report_of_the_run_is_written_as_json(server, tmp_path):
    if not any(n["class_type"] == "TesseraRunReport" for n in json.loads(GRAPH.read_text()).values()):
        pytest.fail("digits_image has no Run Report to read")
    done = run(server, tmp_path, "--set", "KSampler.steps=3", "--set", "Compare.repeats=1", "--report",
               str(tmp_path / "report.json"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    reports = [r for records in json.loads((tmp_path / "report.json").read_text()).values() for r in records]
    (run_report,) = (r for r in reports if "ended" in r)
    (comparison,) = (r for r in reports if r.get("kind") == "compare")
    assert run_report["ended"] == "finished" and run_report["steps"] == 3
    assert comparison["speedup"] > 0 and comparison["b"]["features"][0]["name"] == "Taylor Cache"


@pytest.mark.server
def test_refusal_of_the_server_is_printed(server, tmp_path):
    done = run(server, tmp_path, "--set", "Prompt.text=a cat")
    assert done.returncode == 1
    assert "does not know 'a'" in done.stderr and "Traceback" not in done.stderr


def pictures(*prefixes):
    """A graph that saves one small picture for each prefix."""
    image = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 255}}
    saves = {str(i): {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}}
             for i, prefix in enumerate(prefixes, 2)}  # fmt: skip
    return {"1": image, **saves}


def refused(done, *sentences):
    """Nothing but these sentences: an exit code, and no traceback."""
    assert done.returncode != 0 and done.stdout == ""
    assert "Traceback" not in done.stderr
    for sentence in sentences:
        assert sentence in done.stderr


@pytest.mark.server
def test_one_wrong_output_of_several_refuses_the_graph(server, tmp_path):
    graph = pictures("sound")
    graph["8"] = {"class_type": "LoadImage", "inputs": {"image": "lost.png"}}
    graph["9"] = {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "lost"}}
    (tmp_path / "partial.json").write_text(json.dumps(graph))
    done = run(server, tmp_path / "out", graph=tmp_path / "partial.json")
    refused(done, "LoadImage (8)", "lost.png")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.server
@pytest.mark.parametrize("form", ["{}/", "{}//"])
def test_equal_names_in_two_subfolders_stay_two_files_and_a_slash_at_the_end_is_no_harm(server, tmp_path, form):
    (tmp_path / "two.json").write_text(json.dumps(pictures("left/same", "right/same")))
    words = ("--server", form.format(server.url.removeprefix("http://")))
    done = run(None, tmp_path / "out", *words, graph=tmp_path / "two.json")
    assert done.returncode == 0, done.stderr
    files = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png"))
    assert [file.rpartition("_0")[0] for file in files] == ["left/same", "right/same"]
    assert sorted(done.stdout.split()) == [str(tmp_path / "out" / file) for file in files]


def test_pictures_never_leave_the_folder_and_never_replace_each_other(tmp_path):
    taken = set()
    items = [("a.png", "x"), ("a.png", "x"), ("a.png", ""), ("a.png", "../x"), ("../b.png", "/etc")]
    places = [run_graph.place_of({"filename": n, "subfolder": s}, tmp_path, taken) for n, s in items]
    names = [place.relative_to(tmp_path).as_posix() for place in places]
    assert names == ["x/a.png", "x/a(2).png", "a.png", "x/a(3).png", "etc/b.png"]


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://127.0.0.1:9/", "127.0.0.1:9", "localhost:9"])
def test_no_server_is_said_in_a_sentence(tmp_path, address):
    refused(run(None, tmp_path, "--server", address), "No ComfyUI answers at http://", "Start one, or give --server")


@pytest.mark.parametrize("address", ["ftp://127.0.0.1", "http://", "http://127.0.0.1:port"])
def test_an_address_that_is_none_is_said_in_a_sentence(tmp_path, address):
    refused(run(None, tmp_path, "--server", address), "--server takes an address like http://127.0.0.1:8188")


def test_an_address_is_completed():
    forms = ("localhost:8188", "localhost:8188/", "http://localhost:8188//")
    assert {run_graph.address(form) for form in forms} == {"http://localhost:8188"}
    assert run_graph.address("https://host/comfy/") == "https://host/comfy"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read: No such file"),
        (b"not json", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1, 2]", "is not a graph in API form"),
        (b"{}", "is not a graph in API form"),
        (b'{"1": {"inputs": {}}}', "is not a graph in API form"),
        (
            (ROOT / "workflows/digits_image.json").read_bytes(),
            "canvas form. Export the graph in ComfyUI with Workflow >",
        ),
    ],
    ids=["missing", "text", "binary", "list", "empty", "no class", "canvas"],
)
def test_a_file_that_is_no_graph_is_said_in_a_sentence(tmp_path, content, sentence):
    file = tmp_path / "graph.json"
    if content is not None:
        file.write_bytes(content)
    done = run(None, tmp_path, graph=file)
    refused(done, str(file), sentence)
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_folder_that_cannot_be_made_is_said_before_the_run(tmp_path):
    (tmp_path / "file").touch()
    refused(run(None, tmp_path / "file", "--server", "127.0.0.1:9"), "cannot be made a folder", "--out")
    done = run(None, tmp_path, "--server", "127.0.0.1:9", "--report", str(tmp_path))
    refused(done, "--report takes a file", "is a folder")


def test_a_graph_with_a_mark_at_its_start_and_without_titles_is_read(tmp_path):
    """As an editor on Windows saves it."""
    graph = json.loads(GRAPH.read_text()) | {"99": {"class_type": "Other", "inputs": {"a": 1}, "_meta": None}}
    file = tmp_path / "graph.json"
    file.write_text(json.dumps(graph), encoding="utf-8-sig")
    loaded = run_graph.load(file)
    assert loaded == graph and run_graph.find(loaded, "Other") == "99" and run_graph.find(loaded, "Prompt")


def test_progress_names_nodes_that_another_expanded_into():
    graph = {"5": {"class_type": "Loop", "inputs": {}}}
    assert [run_graph.name_of(graph, key) for key in ("5", "5.0.0.3", "7:1")] == ["Loop", "Loop", "node 7:1"]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("Prompt.words=x", "has no input 'words'"),
        ("TesseraDigitsPrompt.text=x", "2 nodes are called"),
        ("Nobody.text=x", "0 nodes are called"),
        ("text", "takes NODE.INPUT=VALUE"),
    ],
)
def test_settings_that_fit_nothing_are_refused(setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        run_graph.change(json.loads(GRAPH.read_text()), setting)


def test_values_keep_the_type_of_the_input():
    graph = {"1": {"class_type": "A", "inputs": {"text": "x", "steps": 3, "on": False}}}
    for setting in ("1.text=7", "A.steps=9", "A.on=true"):
        run_graph.change(graph, setting)
    assert graph["1"]["inputs"] == {"text": "7", "steps": 9, "on": True}


@pytest.mark.server
def test_a_graph_of_another_pack_runs_with_our_node(server, tmp_path):
    graph = json.loads(GRAPH.read_text())
    for entry in graph.values():
        if entry["class_type"] == "TesseraTaylorCache":
            entry["class_type"] = "TaylorSeerLite"
            entry["inputs"] = {"model": entry["inputs"]["model"], "model_type": "flux", "fresh_threshold": 3, "max_order": 1,
                               "first_enhance": 3, "last_enhance": 50}  # fmt: skip
    assert any(entry["class_type"] == "TaylorSeerLite" for entry in graph.values())
    file = tmp_path / "old.json"
    file.write_text(json.dumps(graph))
    done = run(server, tmp_path, "--set", "KSampler.steps=8", "--set", "Compare.repeats=1", "--report",
               str(tmp_path / "report.json"), graph=file)  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.json").read_text()
    assert '"Taylor Cache"' in text and '"forecast"' in text
