"""A real ComfyUI in a process of its own, driven over HTTP and websocket.

    with ComfyServer() as server:
        entry = server.run(graph)

It works in .host/base, or in a base directory of the caller's, and ends with the process that started it, however that
one ends: the server's standard input is a pipe from its parent, and when that closes the server exits."""

import atexit
import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))

from base_directory import make_base
from graph_errors import GraphError, failure, refusal
from pack import ROOT, comfyui_path

__all__ = ["ComfyServer", "GraphError", "ServerError"]

HOST = "127.0.0.1"
PATIENCE = 30  # seconds between two words that ComfyUI is still starting
CHILD = Path(__file__).resolve().with_name("child.py")
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy to ourselves


class ServerError(RuntimeError):
    """The server did not start, ended, or answered a request with an error: `status` and the decoded `body`."""

    def __init__(self, message, status=None, body=None):
        super().__init__(message)
        self.status, self.body = status, body


def has_gpu():
    """Whether torch can compute on anything but the CPU here."""
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()


def free_port():
    """A free port below the range that outgoing connections are given."""
    for port in random.sample(range(18000, 28000), 50):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((HOST, port))
            return port
    raise ServerError(f"No free port between 18000 and 28000 on {HOST}.")


class ComfyServer:
    """A running ComfyUI; a context manager.

    base: its base directory (default .host/base); made if it is not there, with this pack linked in it.
    port: 0 takes a free one.  extra_args: more command-line words for ComfyUI.  env: more environment variables.
    custom_nodes: further node packs, folders, linked by their name; only with a `base` of one's own.
    echo: print ComfyUI's log instead of keeping it in `self.log`.
    Raises ServerError, with the end of the log, at once when it ends at its start, or if it does not answer within
    `start_timeout` seconds; until then standard error says from time to time that it is still starting."""

    def __init__(self, base=None, port=0, extra_args=(), env=None, custom_nodes=(), echo=False, start_timeout=900):
        if base is None and custom_nodes:
            raise ValueError("ComfyServer links custom_nodes only into a base of their own: give it base=FOLDER.")
        self.base = Path(base or ROOT / ".host" / "base").resolve()
        self.port = port or free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.log = self.base / f"server-{self.port}.log"
        self.temp = self.base / "temp" / str(self.port)  # ComfyUI empties its own at every start
        self.extra_args, self.env, self.echo, self.start_timeout = extra_args, env or {}, echo, start_timeout
        self.packs = {"tessera": ROOT, **{Path(pack).name: pack for pack in custom_nodes}}
        self.process = None

    def start(self):
        """Starts the process and waits until it answers; returns self."""
        main = comfyui_path() / "main.py"
        if not main.is_file():
            raise ServerError(f"There is no ComfyUI at {main.parent}: run `make setup`, or set COMFYUI_PATH.")
        make_base(self.base, self.packs)
        command = [sys.executable, str(CHILD), str(main), "--port", str(self.port), "--base-directory", str(self.base)]
        command += ["--temp-directory", str(self.temp), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-api-nodes", "--dont-print-server", *([] if has_gpu() else ["--cpu"]), *self.extra_args]
        env = {**os.environ, "PYTHONPYCACHEPREFIX": str(ROOT / ".host" / "pycache"), "PYTHONUNBUFFERED": "1"}
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # the prefix keeps ComfyUI's folder clean and halves the start
        with contextlib.ExitStack() as files:
            log = None if self.echo else files.enter_context(self.log.open("wb"))
            self.process = subprocess.Popen(
                command, cwd=self.base, env={**env, **self.env}, stdin=subprocess.PIPE, stdout=log, stderr=log
            )
        atexit.register(self.stop)
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def _wait_until_ready(self):
        start = word = time.monotonic()
        while (now := time.monotonic()) < start + self.start_timeout:
            if now >= word + PATIENCE:
                word = now
                print(f"ComfyUI is still starting after {now - start:.0f} s…", file=sys.stderr, flush=True)
            if self.process.poll() is not None:
                raise ServerError(f"ComfyUI ended with code {self.process.returncode} at its start.\n{self.tail()}")
            with contextlib.suppress(OSError, ServerError):
                self.get("/system_stats")
                return
            time.sleep(0.2)
        raise ServerError(f"ComfyUI did not answer on port {self.port} in {self.start_timeout} s.\n{self.tail()}")

    def stop(self):
        """Ends the server: asked first, killed after 5 seconds."""
        atexit.unregister(self.stop)
        process, self.process = self.process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdin.close()
        shutil.rmtree(self.temp, ignore_errors=True)

    __enter__ = start

    def __exit__(self, *exc):
        self.stop()

    def tail(self, lines=40):
        """The last lines of the server's log."""
        text = self.log.read_text(errors="replace") if self.log.is_file() else ""
        return "\n".join(text.splitlines()[-lines:])

    def get(self, path):
        """GET; decoded JSON, or bytes. Raises ServerError on an error status."""
        return self._request(urllib.request.Request(self.url + path))

    def post(self, path, data=None):
        """POST of a JSON body; decoded JSON, or bytes. Raises ServerError on an error status."""
        body = json.dumps(data if data is not None else {}).encode()
        return self._request(urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"}))

    def _request(self, request):
        try:
            with OPENER.open(request, timeout=60) as answer:
                return _decoded(answer)
        except urllib.error.HTTPError as error:
            body = _decoded(error)
            message = f"{request.get_method()} {request.selector} answered {error.code}: {str(body)[:500]}"
            raise ServerError(message, error.code, body) from error

    def interrupt(self):
        """Stops the graph that is running."""
        self.post("/interrupt")

    def run(self, graph, client_id=None, on_event=None, timeout=600):
        """Runs a graph in API form {id: {class_type, inputs}} to its end and returns its entry in /history.

        on_event(type, data) is called with every JSON message. Raises GraphError when the graph is refused, fails or is
        interrupted, TimeoutError after `timeout` seconds, ServerError when the server ends."""
        from websocket import create_connection

        client_id = client_id or uuid.uuid4().hex
        deadline = time.monotonic() + timeout
        channel = create_connection(f"ws://{HOST}:{self.port}/ws?clientId={client_id}", timeout=30)
        try:
            prompt_id = self._queue(graph, client_id)
            error = self._follow(channel, prompt_id, on_event, deadline)
        finally:
            channel.close()
        if error:
            raise error
        return self.get(f"/history/{prompt_id}")[prompt_id]

    def _queue(self, graph, client_id):
        try:
            answer = self.post("/prompt", {"prompt": graph, "client_id": client_id})
        except ServerError as error:
            if error.status == 400 and isinstance(error.body, dict):
                raise refusal(error.body) from None
            raise
        prompt_id = answer["prompt_id"]
        if answer.get("node_errors"):  # the server would run the outputs that are sound, without a word
            self._drop(prompt_id)
            raise refusal(answer)
        return prompt_id

    def _drop(self, prompt_id):
        self.post("/queue", {"delete": [prompt_id]})
        self.post("/interrupt", {"prompt_id": prompt_id})

    def _follow(self, channel, prompt_id, on_event, deadline):
        """Reads events until the run is over, which is also when it is in the history; the run's error or None."""
        from websocket import WebSocketConnectionClosedException, WebSocketTimeoutException

        error = None
        while True:
            if time.monotonic() > deadline:
                self._drop(prompt_id)
                raise TimeoutError(f"The graph was still running at its time limit and was interrupted.\n{self.tail()}")
            channel.settimeout(max(0.1, min(2.0, deadline - time.monotonic())))
            try:
                message = channel.recv()
            except WebSocketTimeoutException:
                continue
            except (WebSocketConnectionClosedException, OSError) as closed:
                raise ServerError(f"ComfyUI ended or hung up while a graph ran.\n{self.tail()}") from closed
            if isinstance(message, bytes):
                continue
            event = json.loads(message)
            kind, data = event["type"], event.get("data") or {}
            if on_event:
                on_event(kind, data)
            if isinstance(data, dict) and data.get("prompt_id") == prompt_id:
                error = error or failure(kind, data)
                if kind == "executing" and data["node"] is None:
                    return error

    def outputs(self, entry):
        """The files that a run saved, as paths, in the order of its nodes; `entry` is what `run` returned."""
        roots = {"output": self.base / "output", "input": self.base / "input", "temp": self.temp / "temp"}
        return [
            roots[item["type"]] / item.get("subfolder", "") / item["filename"]
            for node in entry["outputs"].values()
            for items in node.values()
            if isinstance(items, list)
            for item in items
            if isinstance(item, dict) and {"filename", "type"} <= item.keys()
        ]


def _decoded(answer):
    body = answer.read()
    if "json" not in (answer.headers.get("Content-Type") or ""):
        return body
    return json.loads(body) if body else None
