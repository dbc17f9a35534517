"""ComfyServer: what it says when something fails, and that it never outlives its parent or writes into ComfyUI."""

import importlib.util
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

BOOTSTRAP = Path(__file__).resolve().parents[1] / "bootstrap"
FAKE = """
import http.server, sys
import comfy
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Type", "application/json"); self.end_headers()
        self.wfile.write(b'{"fake": true}')
print("listening", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answer).serve_forever()
"""
TEST_PACK = """
import time
import comfy.model_management
class Act:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"seconds": ("INT", {"min": 0}), "fail": ("BOOLEAN",)}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "act", True, "test"
    def act(self, seconds, fail):
        if fail:
            raise ValueError("3 tokens, 4 wanted")
        for _ in range(100 * seconds):
            time.sleep(0.01)
            comfy.model_management.throw_exception_if_processing_interrupted()
        return {"ui": {"seconds": [seconds]}}
NODE_CLASS_MAPPINGS = {"Act": Act}
"""


def load(name):
    spec = importlib.util.spec_from_file_location(f"tessera_bootstrap_{name}", BOOTSTRAP / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


server = load("comfy_server")


@pytest.fixture
def fake_comfyui(tmp_path, monkeypatch):
    folder = tmp_path / "ComfyUI"
    (folder / "comfy").mkdir(parents=True)
    (folder / "comfy" / "__init__.py").touch()
    (folder / "main.py").write_text(FAKE)
    monkeypatch.setenv("COMFYUI_PATH", str(folder))
    return folder


def answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_nothing_is_written_into_comfyui(fake_comfyui, tmp_path):
    with server.ComfyServer(base=tmp_path / "base") as running:
        assert running.get("/system_stats") == {"fake": True}
        assert (tmp_path / "base" / "custom_nodes" / "tessera" / "bootstrap" / "comfy_server.py").is_file()
    assert not answers(running.port)
    files = sorted(p.relative_to(fake_comfyui).as_posix() for p in fake_comfyui.rglob("*"))
    assert files == ["comfy", "comfy/__init__.py", "main.py"]


def test_failed_start_shows_the_log(fake_comfyui, tmp_path):
    (fake_comfyui / "main.py").write_text("raise RuntimeError('the driver is too old')")
    with pytest.raises(server.ServerError, match="(?s)ended with code 1 at its start.*the driver is too old"):
        server.ComfyServer(base=tmp_path / "base").start()


def test_silent_start_ends_in_a_sentence(fake_comfyui, tmp_path):
    (fake_comfyui / "main.py").write_text("print('asleep', flush=True); import time; time.sleep(60)")
    slow = server.ComfyServer(base=tmp_path / "base", start_timeout=1)
    with pytest.raises(server.ServerError, match="did not answer on port"):
        slow.start()
    assert slow.process is None


def test_a_long_start_is_said_now_and_then(fake_comfyui, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(server, "PATIENCE", 0.3)
    main = fake_comfyui / "main.py"
    main.write_text(f"import time; time.sleep(1)\n{main.read_text()}")
    with server.ComfyServer(base=tmp_path / "base"):
        pass
    said = [re.sub(r"\d+", "N", line) for line in capfd.readouterr().err.splitlines()]
    assert len(said) >= 2 and set(said) == {"ComfyUI is still starting after N s…"}


def test_a_start_may_take_a_slow_machine_a_quarter_of_an_hour():
    assert server.ComfyServer(base="unused").start_timeout == 900 and server.PATIENCE == 30


def test_missing_comfyui_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(server.ServerError, match="no ComfyUI at .*make setup"):
        server.ComfyServer(base=tmp_path / "base").start()


def test_packs_are_not_linked_into_the_shared_base():
    with pytest.raises(ValueError, match="base=FOLDER"):
        server.ComfyServer(custom_nodes=["pack"])


@pytest.mark.parametrize("end", ["raise SystemExit(3)", "os.kill(os.getpid(), 9)"])
def test_server_ends_with_its_parent(fake_comfyui, tmp_path, end):
    code = f"import os; from comfy_server import ComfyServer; s = ComfyServer(base={str(tmp_path / 'base')!r}).start()"
    parent = [sys.executable, "-c", f"{code}; print(s.port, flush=True); {end}"]
    done = subprocess.run(parent, cwd=BOOTSTRAP, capture_output=True, text=True, timeout=120)
    assert done.returncode in (3, -signal.SIGKILL), done.stderr
    deadline = time.monotonic() + 10
    while answers(int(done.stdout)):
        assert time.monotonic() < deadline, "the server outlived the process that started it"
        time.sleep(0.01)


def test_refusals_name_every_node():
    reason = {"type": "value_not_in_list", "message": "Value not in list", "details": "unet_name: 'x' not in []"}
    body = {
        "error": {"type": "prompt_outputs_failed_validation", "message": "Prompt outputs failed validation"},
        "node_errors": {
            "3": {"class_type": "UNETLoader", "errors": [reason]},
            "7": {"class_type": "KSampler", "errors": [{**reason, "type": "value_smaller_than_min"}]},
        },
    }
    error = server.refusal(body)
    assert (error.kind, error.node_id, error.node_type) == ("value_not_in_list", "3", "UNETLoader")
    assert "node 3 (UNETLoader): Value not in list: unet_name" in str(error) and "node 7 (KSampler)" in str(error)


def when_node_9_runs(act):
    return lambda kind, data: act() if kind == "executing" and data["node"] == "9" else None


@pytest.mark.server
def test_real_server_runs_refuses_fails_and_stops(tmp_path):
    pack = tmp_path / "act"
    pack.mkdir()
    (pack / "__init__.py").write_text(TEST_PACK)

    def graph(seconds=0, fail=False):
        return {"9": {"class_type": "Act", "inputs": {"seconds": seconds, "fail": fail}}}

    image = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 2, "color": 255}}
    save = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "saved"}}
    with server.ComfyServer(base=tmp_path / "base", custom_nodes=[pack]) as comfy:
        events = []
        entry = comfy.run({"1": image, "2": save, **graph()}, on_event=lambda kind, data: events.append(kind))
        assert entry["outputs"]["9"] == {"seconds": [0]} and events[-1] == "executing" and "executed" in events
        assert [path.read_bytes()[1:4] for path in comfy.outputs(entry)] == [b"PNG", b"PNG"]

        with pytest.raises(
            server.GraphError, match="Node 9 .Act. failed with ValueError: 3 tokens, 4 wanted"
        ) as failed:
            comfy.run(graph(fail=True))
        assert (failed.value.node_id, failed.value.kind) == ("9", "ValueError")

        lost = {"class_type": "LoadImage", "inputs": {"image": "lost.png"}}
        with pytest.raises(server.GraphError, match="refused: node 1 .LoadImage.*lost.png"):
            comfy.run({"1": lost, "2": save, **graph(seconds=60)})
        assert comfy.run(graph(seconds=1))["status"]["status_str"] == "success", "nothing of the refused graph runs on"

        with pytest.raises(server.GraphError, match="interrupted in node 9") as stopped:
            comfy.run(graph(seconds=60), on_event=when_node_9_runs(comfy.interrupt))
        assert stopped.value.kind == "interrupted"
        with pytest.raises(TimeoutError, match="was interrupted"):
            comfy.run(graph(seconds=60), timeout=0.5)
        with pytest.raises(server.ServerError, match="404"):
            comfy.get("/no/such/route")
        assert comfy.run(graph(), timeout=30), "the run that timed out does not go on"
        with pytest.raises(server.ServerError, match="ended or hung up"):
            comfy.run(graph(seconds=60), on_event=when_node_9_runs(comfy.process.kill))
