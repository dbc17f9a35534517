"""`make demo`: its results lie in .host alone, without those of an earlier run, and it says what it is doing."""

import demo
import pytest
from PIL import Image

COMPARED = {
    "a": {"seconds": {"median": 4.0}},
    "b": {"seconds": {"median": 2.0}, "blocks_computed": 3, "blocks_total": 10, "blocks_skipped": 7, "pairs_fraction": 1.0},
    "repeats": 3, "speedup": 2.0, "ssim": 0.97, "psnr": 30.0, "latent_error": 0.04,
}  # fmt: skip


class Server:
    """Answers a graph with one picture, and with a comparison where the graph has one. Keeps what was said before."""

    url = "http://127.0.0.1:1"

    def __init__(self, folder, said):
        self.folder, self.said, self.before = folder, said, []

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def run(self, graph):
        self.before.append(self.said().splitlines()[-1])
        return {"outputs": {key: {"tessera_report": [COMPARED]} for key, node in graph.items()
                            if node["class_type"] == "TesseraCompare"}}  # fmt: skip

    def outputs(self, entry):
        path = self.folder / "picture_00001_.png"
        Image.new("L", (8, 8), 90).save(path)
        return [path]


@pytest.fixture
def server(monkeypatch, tmp_path, capsys):
    made = Server(tmp_path, lambda: capsys.readouterr().out)
    graphs = {name: demo.load(name) for name in demo.GRAPHS}
    monkeypatch.setattr(demo, "load", graphs.get)
    monkeypatch.setattr(demo, "ComfyServer", lambda: made)
    monkeypatch.setattr(demo, "Reader", lambda: None)
    monkeypatch.setattr(demo, "read_right", lambda reader, graph, frames: f"{len(frames)} read")
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "OUT", tmp_path / ".host" / "demo")
    return made


def test_results_lie_in_the_folder_that_make_clean_removes():
    assert demo.OUT == demo.ROOT / ".host" / "demo"


def test_an_earlier_result_is_gone_and_each_run_is_announced(server, tmp_path):
    old = tmp_path / ".host" / "demo" / "digits_image_plain_00099.png"
    old.parent.mkdir(parents=True)
    old.touch()
    demo.main()
    assert not old.exists()
    names = sorted(p.name for p in old.parent.iterdir())
    sides = [f"{name}_{side}_00001.png" for name in demo.GRAPHS for side in ("accelerated", "plain")]
    assert names == sorted([*sides, *(f"{name}.json" for name in demo.GRAPHS)])
    words = ["running plain", "running accelerated", "running both in turn"]
    assert len(server.before) == len(words) * len(demo.GRAPHS)
    assert all(word in said for word, said in zip(words * len(demo.GRAPHS), server.before, strict=True))
