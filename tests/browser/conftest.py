"""A real server and a real Chromium for the canvas tests."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path.append(str(ROOT / "bootstrap"))

from comfy_server import ComfyServer

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
READY = """() => !!(window.app?.isGraphReady && app.extensionManager?.workflow?.activeWorkflow
    && LiteGraph.registered_node_types.TesseraRunReport)"""
OF_CORE = (  # the frontend's own, at the first visit of a fresh profile, with or without this pack
    "Failed to load resource: the server responded with a status of 404",
    "ComfyApp graph accessed before initialization",
    "Connecting to 'https://huggingface.co/Comfy-Org/",  # sizes of the default graph's models, refused by the server's
    "Fetch API cannot load https://huggingface.co/Comfy-Org/",  # content policy
)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A ComfyUI with this pack, the fixture pack and a tiny Flux."""
    base = tmp_path_factory.mktemp("browser")
    models = base / "models" / "diffusion_models"
    command = [sys.executable, str(ROOT / "bootstrap" / "tiny_models.py"), "--out", str(models), "--only", "flux"]
    subprocess.run(command, check=True, capture_output=True)
    with ComfyServer(base=base, custom_nodes=[HERE / "fixture_pack"]) as running:
        yield running


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium. Without one the tests skip, but fail where CI is set."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        message = "No Chromium: install one (apt-get install chromium) or name it in CHROMIUM."
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Canvas:
    """A page with the canvas open, and what its console and network said."""

    def __init__(self, page, shots: Path):
        self.page, self.shots = page, shots
        self.problems: list[str] = []
        self.requests: list[tuple[str, int]] = []
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("response", lambda answer: self.requests.append((answer.url, answer.status)))

    def _heard(self, message):
        weights = "https://huggingface.co/" in message.text  # core asks for the sizes of files that a template names
        if message.type == "error" and not message.text.startswith(OF_CORE) and not weights:
            self.problems.append(message.text)

    def open(self, url: str):
        self.page.goto(url, wait_until="domcontentloaded")
        self._ready()

    def reload(self):
        self.page.reload(wait_until="domcontentloaded")
        self._ready()

    def _ready(self):
        self.page.wait_for_function(READY, timeout=300_000)
        self.page.wait_for_load_state("networkidle")
        self.page.keyboard.press("Escape")  # the template browser of a first visit
        self.page.evaluate((HERE / "graphs.js").read_text("utf-8"))  # add_script_tag fails on errors that are not ours

    def look(self, renderer: str, theme: str = "dark"):
        """Chooses the node renderer, "classic" or "vue", and the palette."""
        set_both = "async ([vue, theme]) => { for (const [k, v] of Object.entries({'Comfy.VueNodes.Enabled': vue,"
        set_both += " 'Comfy.ColorPalette': theme})) await app.extensionManager.setting.set(k, v); }"
        self.page.evaluate(set_both, [renderer == "vue", theme])
        self.page.wait_for_function("vue => LiteGraph.vueNodesMode === vue", arg=renderer == "vue")

    def call(self, name: str, *args):
        """Calls a function of graphs.js."""
        return self.page.evaluate(f"args => tesseraTest.{name}(...args)", list(args))

    def queue(self):
        assert self.page.evaluate("app.queuePrompt(0, 1)"), "the server refused the graph"

    def panel(self, node: str, name: str):
        """The element of a node's panel, once it is there and laid out."""
        found = "([id, name]) => { const e = tesseraTest.panel(id, name); return e?.offsetHeight ? e : null; }"
        return self.page.wait_for_function(found, arg=[node, name], timeout=60_000).as_element()

    def has_panel(self, node: str, name: str) -> bool:
        return self.page.evaluate("([id, name]) => !!tesseraTest.panel(id, name)", [node, name])

    def shoot(self, name: str):
        """A screenshot; also in $TESSERA_SHOTS if that is set."""
        path = self.shots / f"{name}.png"
        self.page.screenshot(path=str(path))
        if os.environ.get("TESSERA_SHOTS"):
            Path(os.environ["TESSERA_SHOTS"]).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, os.environ["TESSERA_SHOTS"])
        return path


@pytest.fixture
def canvas(server, chromium, tmp_path):
    """A fresh profile with the canvas open. Fails at the end if the console showed an error."""
    with _profile(chromium) as page:
        opened = Canvas(page, tmp_path)
        opened.open(server.url)
        yield opened
        assert opened.problems == []


@contextmanager
def _profile(browser):
    context = browser.new_context(viewport={"width": 1500, "height": 1000})
    try:
        yield context.new_page()
    finally:
        context.close()
